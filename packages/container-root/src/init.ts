import { cloneLayer, importLayer, type Namespace } from '@lsync/overlay-merge'
import {
  AT_FDCWD,
  type ByteString,
  type HostPath,
  LsyncError,
  O_RDONLY,
  openat,
  randomHex,
  statFd,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { importImage } from '@lsync/snapshot'
import { Home } from './home.ts'
import type { NodeRecord, RootRecord } from './records.ts'

/** A root begins as something. */
export class BaseMissingError extends LsyncError {
  constructor() {
    super('BASE_MISSING', 'no base is named', { hint: 'name a directory, a tar or an OCI layout with --base' })
  }
}

/** What a root begins as: a directory, a tar (as of `docker export`, compressed or not), or an OCI image layout. */
type BaseForm = 'directory' | 'tar' | 'oci'

export interface InitRequest {
  /** The home to make; its parent must be there. */
  readonly home: HostPath
  /** Top first: what lies above what. An OCI layout gives all layers of its image. */
  readonly bases: readonly HostPath[]
  readonly namespace?: Namespace
  readonly node: NodeRecord
  readonly signal?: AbortSignal
}

/** What a path is, as a base. */
function baseFormOf(path: HostPath): BaseForm {
  const fd = openat(AT_FDCWD, path, O_RDONLY)
  return withFd(fd, () => {
    if (!statFd(fd).isDirectory) return 'tar'
    return tryStatAt(fd, 'oci-layout' as ByteString) === undefined ? 'directory' : 'oci'
  })
}

/**
 * Makes the home of a root: its bases as layers, the lowest as bottom, and version 1. It is one once all is durable; what an
 * interrupted run left is made anew.
 * @throws {BaseMissingError}, {HomeExistsError}, and what reading the bases throws
 */
export async function initHome(request: InitRequest): Promise<Home> {
  const { node, namespace = 'trusted' } = request
  const record: RootRecord = { format: 1, id: randomHex(16), createdAtMs: Date.now(), namespace }
  if (request.bases.length === 0) throw new BaseMissingError()
  return Home.create(request.home, record, async (home) => {
    const layers: string[] = []
    // From the bottom up.
    for (const base of request.bases.toReversed())
      layers.unshift(...(await importBase(home, request, base, layers.length)))
    home.publishFirst({ layers, madeBy: 'init', nodeId: node.id, nodeName: node.name })
  })
}

/** The ids of the layers that a base gave, top first. */
async function importBase(home: Home, request: InitRequest, base: HostPath, below: number): Promise<string[]> {
  const { namespace = 'trusted', signal } = request
  const common = signal === undefined ? {} : { signal }
  const form = baseFormOf(base)
  if (form === 'oci') {
    return home.withScratch(0, randomHex(16), async (path) => {
      const { layers } = await importImage({ layout: base, to: `${path}/image` as HostPath, namespace, ...common })
      // Bottom first, as images have them.
      const ids = layers.map((layer, i) =>
        home.adoptTree(layer.path, { isBottom: below === 0 && i === 0, madeBy: 'init' }),
      )
      return ids.reverse()
    })
  }
  return home.withScratch(0, randomHex(16), async (path) => {
    const to = `${path}/tree` as HostPath
    if (form === 'directory') await cloneLayer({ from: base, to, namespace, sharesInodes: false, ...common })
    else {
      const toForm = namespace === 'trusted' ? 'kernel-trusted' : 'kernel-user'
      await importLayer({ from: base, form: 'plain-tar', to, toForm, namespace, ...common })
    }
    return [home.adoptTree(to, { isBottom: below === 0, madeBy: 'init' })]
  })
}
