import type { HostPath } from '@lsync/posix'
import { MARKS, type Namespace } from './model/marks.ts'
import type { Stack } from './resolve.ts'
import { closeLayer, type Layer, openLayer } from './scan.ts'
import type { StackInit } from './work.ts'

/** The layers of a view, as on the mount: top first. */
export interface StackRequest {
  readonly upper: HostPath
  readonly lowers: readonly HostPath[]
  /** Data-only lowers (`lowerdir=…::d1::d2`). */
  readonly data?: readonly HostPath[]
  /** Whose marks count, as the mount decides (`userxattr`). Default `trusted`. */
  readonly namespace?: Namespace
}

/** A stack whose layers are open. */
export interface OpenStack extends Stack {
  readonly namespace: Namespace
}

/** Opens all layers of a request; `below` says that something unknown lies beneath them. Close with `closeStack`. */
export function openStack(request: StackRequest, below: boolean, depth = request.lowers.length): OpenStack {
  const namespace = request.namespace ?? 'trusted'
  const opened: Layer[] = []
  const open = (path: HostPath) => {
    const layer = openLayer(path, namespace)
    opened.push(layer)
    return layer
  }
  try {
    const layers = [request.upper, ...request.lowers.slice(0, depth)].map(open)
    const data = (request.data ?? []).map(open)
    return { layers, data, below, followRedirects: namespace === 'trusted', namespace }
  } catch (error) {
    for (const layer of opened) closeLayer(layer)
    throw error
  }
}

export function closeStack(stack: Stack): void {
  for (const layer of [...stack.layers, ...stack.data]) closeLayer(layer)
}

/** The stack that an init describes, in another thread: its descriptors are the process's, and stay whose they were. */
export function stackFrom({ layers, data, namespace, below }: StackInit): OpenStack {
  const layerOf = ({ path, fd }: StackInit['layers'][number]): Layer => ({
    path: path as HostPath,
    fd,
    marks: MARKS[namespace],
  })
  const followRedirects = namespace === 'trusted'
  return { layers: layers.map(layerOf), data: data.map(layerOf), below, followRedirects, namespace }
}

/** A stack in the form that travels to workers. */
export function stackInit(stack: OpenStack): StackInit {
  const plain = ({ path, fd }: Layer) => ({ path, fd })
  return {
    layers: stack.layers.map(plain),
    data: stack.data.map(plain),
    namespace: stack.namespace,
    below: stack.below,
  }
}
