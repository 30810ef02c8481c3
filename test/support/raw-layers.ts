import { mkdirSync } from 'node:fs'
import fc from 'fast-check'
import {
  type Attributes,
  buildTree,
  character,
  type DirectorySpec,
  dir,
  fifo,
  file,
  linkTo,
  metacopy,
  opaque,
  redirected,
  type Spec,
  symlink,
  whiteout,
  xattrWhiteout,
} from './build.ts'

/**
 * Layers made by hand: any state at any name, as no kernel would necessarily write them but every kernel reads them
 * (overlay-format §11 "Verified"). `marks: 'follow'` allows redirects and metacopies.
 */
export interface RawLayerOptions {
  readonly namespace: 'trusted' | 'user'
  readonly redirects: boolean
  readonly metacopies: boolean
}

const names = ['a', 'b', 'c', 'd']
const DEPTH = 3
const DATA_BYTES = 5

type State = { spec: Spec | undefined }

/** One layer of states over the names a to d, three deep. No directory of it shares its origin with another one. */
export function anyRawLayer(options: RawLayerOptions): fc.Arbitrary<DirectorySpec> {
  return anyChildren(options, DEPTH).chain((children) =>
    anyAttributes.map((attributes) => withOwnOrigins(withValidLinks(dir(children, attributes)))),
  )
}

const anyAttributes: fc.Arbitrary<Attributes> = fc.oneof(
  { weight: 4, arbitrary: fc.constant({}) },
  {
    weight: 1,
    arbitrary: fc.record({
      mode: fc.constantFrom(0o700, 0o1777, 0o2755),
      uid: fc.constantFrom(0, 1000),
      gid: fc.constantFrom(0, 100_000),
    }),
  },
  { weight: 1, arbitrary: fc.constantFrom({ xattrs: { 'user.a': '1' } }, { xattrs: { 'trusted.b': '' } }) },
)

function anyChildren(options: RawLayerOptions, depth: number): fc.Arbitrary<Record<string, Spec>> {
  const state = anyState(options, depth)
  return fc.tuple(state, state, state, state).map((states) => {
    const children: Record<string, Spec> = {}
    for (const [index, { spec }] of states.entries()) {
      if (spec !== undefined) children[names[index] as string] = spec
    }
    return children
  })
}

function anyState(options: RawLayerOptions, depth: number): fc.Arbitrary<State> {
  const here = (spec: Spec | undefined): fc.Arbitrary<State> => fc.constant({ spec })
  const leaves = [
    { weight: 6, arbitrary: here(undefined) },
    { weight: 3, arbitrary: here(whiteout()) },
    { weight: 1, arbitrary: here(xattrWhiteout()) },
    {
      weight: 4,
      arbitrary: fc
        .tuple(fc.constantFrom('one 1', 'two 2', 'three'), anyAttributes)
        .map(([content, attributes]): State => ({ spec: file(content, attributes) })),
    },
    { weight: 1, arbitrary: here(symlink('a')) },
    { weight: 1, arbitrary: fc.constantFrom<State>({ spec: fifo() }, { spec: character(1, 3) }) },
    { weight: 1, arbitrary: here(linkTo('')) },
    // All data is of one size, the one that the metacopies state. Marks that mean nothing where they stand:
    { weight: 1, arbitrary: here(file('marks', { marks: { whiteout: 'y', redirect: '/b' } })) },
  ]
  if (options.metacopies) {
    const redirect = fc.option(anyRedirect, { nil: undefined })
    leaves.push({
      weight: 1,
      arbitrary: redirect.map(
        (to): State => ({ spec: to === undefined ? metacopy(DATA_BYTES) : metacopy(DATA_BYTES, { redirect: to }) }),
      ),
    })
  }
  if (depth === 0) return fc.oneof(...leaves)
  const children = fc.tuple(anyChildren(options, depth - 1), anyAttributes)
  const directories = [
    { weight: 5, arbitrary: children.map(([c, attributes]): State => ({ spec: dir(c, attributes) })) },
    { weight: 2, arbitrary: children.map(([c, attributes]): State => ({ spec: opaque(c, attributes) })) },
    {
      weight: 1,
      arbitrary: fc
        .tuple(children, fc.constantFrom('x', 'Y', ''))
        .map(([[c, attributes], value]): State => ({ spec: dir(c, { ...attributes, marks: { opaque: value } }) })),
    },
  ]
  if (options.redirects) {
    directories.push({
      weight: 3,
      arbitrary: fc
        .tuple(anyRedirect, children)
        .map(([to, [c, attributes]]): State => ({ spec: redirected(to, c, attributes) })),
    })
  }
  return fc.oneof(...leaves, ...directories)
}

const oneName = fc.constantFrom(...names)
const anyRedirect = fc.oneof(
  oneName,
  fc.array(oneName, { minLength: 1, maxLength: 3 }).map((parts) => `/${parts.join('/')}`),
)

/** Hard links point to the file that stands first in the layer; where there is none, they become files. */
function withValidLinks(root: DirectorySpec): DirectorySpec {
  const first = firstFile(root, '')
  const fix = (spec: Spec): Spec => {
    if (spec.kind === 'link') return first === undefined ? file('link.') : linkTo(first)
    if (spec.kind !== 'directory') return spec
    return {
      ...spec,
      children: Object.fromEntries(Object.entries(spec.children).map(([key, child]) => [key, fix(child)])),
    }
  }
  return fix(root) as DirectorySpec
}

function firstFile(spec: DirectorySpec, path: string): string | undefined {
  for (const [name, child] of Object.entries(spec.children)) {
    const childPath = path === '' ? name : `${path}/${name}`
    if (child.kind === 'file' && child.marks === undefined) return childPath
    const deeper = child.kind === 'directory' ? firstFile(child, childPath) : undefined
    if (deeper !== undefined) return deeper
  }
  return undefined
}

/**
 * The second directory that would merge with one place beneath becomes opaque: the kernel answers ESTALE for one of
 * two such directories once there is an upper, and never makes them itself (overlay-format §3).
 */
function withOwnOrigins(root: DirectorySpec): DirectorySpec {
  const taken = new Set<string>()
  const fix = (spec: DirectorySpec, origin: string | undefined): DirectorySpec => {
    const children: Record<string, Spec> = {}
    for (const [name, child] of Object.entries(spec.children)) {
      if (child.kind !== 'directory') {
        children[name] = child
        continue
      }
      const own = originOf(child, name, origin)
      if (own !== undefined && taken.has(own)) children[name] = fix(opaque(child.children, child), undefined)
      else {
        if (own !== undefined) taken.add(own)
        children[name] = fix(child, own)
      }
    }
    return { ...spec, children }
  }
  return fix(root, '')
}

function originOf(spec: DirectorySpec, name: string, parent: string | undefined): string | undefined {
  const redirect = spec.marks?.['redirect']
  if (spec.marks?.['opaque'] === 'y') return undefined
  if (redirect?.startsWith('/')) return redirect
  return parent === undefined ? undefined : `${parent}/${redirect ?? name}`
}

/** The same layer with full (empty) files instead of metacopies. */
export function withoutMetacopies(spec: DirectorySpec): DirectorySpec {
  const fix = (child: Spec): Spec => {
    if (child.kind === 'directory') return withoutMetacopies(child)
    return child.marks?.['metacopy'] === undefined ? child : file('full')
  }
  const children = Object.fromEntries(Object.entries(spec.children).map(([name, child]) => [name, fix(child)]))
  return { ...spec, children }
}

/** A stack of such layers, top first, for a mount of lowers only. */
export function anyRawStack(layers: number, options: RawLayerOptions): fc.Arbitrary<DirectorySpec[]> {
  return fc.array(anyRawLayer(options), { minLength: layers, maxLength: layers })
}

/** Builds the layers `u`, `l1`, `l2`… (top first) in `directory` and gives their paths. */
export function buildLayers(
  directory: string,
  layers: readonly DirectorySpec[],
  namespace: 'trusted' | 'user',
): string[] {
  mkdirSync(directory, { recursive: true })
  return layers.map((spec, index) => {
    const path = `${directory}/${index === 0 ? 'u' : `l${index}`}`
    buildTree(path, spec, { namespace, epoch: 1_600_000_000 - index * 100_000 })
    return path
  })
}
