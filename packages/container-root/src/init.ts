import { mkdtemp } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, dirname } from 'node:path'
import { cloneLayer, importLayer, type Namespace, removeTree } from '@lsync/overlay-merge'
import {
  AT_FDCWD,
  type ByteString,
  bytesOf,
  type HostPath,
  LsyncError,
  O_RDONLY,
  openat,
  openRoot,
  randomHex,
  statFd,
  textOf,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { importImage } from '@lsync/snapshot'
import { Home, newLayer } from './home.ts'
import type { LeaseKeeping, NodeRecord, RootRecord } from './records.ts'
import { sealInto } from './seal-into.ts'
import type { SealLossyError } from './sealed-layer.ts'
import { type LayerStorage, layerFormFor } from './store-form.ts'

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
  /** How layers are kept. Default: as the store can (`tryStore`). */
  readonly layerForm?: LayerStorage
  /** A local directory, where trees are made that are to be sealed. Default: the system's. */
  readonly scratch?: HostPath
  /** Hears of what sealed layers cannot hold: chattr flags. */
  readonly onLoss?: (loss: SealLossyError) => void
  readonly node: NodeRecord
  /** Who keeps the right to write, for all nodes. Default: files in the home. */
  readonly lease?: LeaseKeeping
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
  if (request.bases.length === 0) throw new BaseMissingError()
  const layerForm = request.layerForm ?? layerFormFor(request.home)
  const record: RootRecord = {
    format: 1,
    id: randomHex(16),
    createdAtMs: Date.now(),
    namespace,
    layerForm,
    ...(request.lease === undefined ? {} : { lease: request.lease }),
  }
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
  const isSealing = home.record.layerForm === 'sealed'
  const form = baseFormOf(base)
  const adopt = async (tree: HostPath, isBottom: boolean) => {
    if (!isSealing) return home.adoptTree(tree, { isBottom, madeBy: 'init' })
    const record = newLayer({ isBottom, madeBy: 'init' })
    const scratch = request.scratch ?? (bytesOf(tmpdir()) as HostPath)
    await sealInto(home, { tree, record, epoch: 0, scratch, onLoss: request.onLoss, signal }, (name, sealed) =>
      home.promote(0, name, sealed),
    )
    return record.id
  }
  // A directory is sealed as it is.
  if (isSealing && form === 'directory') return [await adopt(base, below === 0)]
  return withTreePlace(home, request, async (place) => {
    if (form === 'oci') {
      const { layers } = await importImage({ layout: base, to: `${place}/image` as HostPath, namespace, ...common })
      const ids: string[] = []
      // Bottom first, as images have them.
      for (const { path } of layers) ids.unshift(await adopt(path, below === 0 && ids.length === 0))
      return ids
    }
    const to = `${place}/tree` as HostPath
    if (form === 'directory') await cloneLayer({ from: base, to, namespace, sharesInodes: false, ...common })
    else {
      const toForm = namespace === 'trusted' ? 'kernel-trusted' : 'kernel-user'
      await importLayer({ from: base, form: 'plain-tar', to, toForm, namespace, ...common })
    }
    return [await adopt(to, below === 0)]
  })
}

/** A directory where trees can be made: on the store where they become layers there by a rename, else on this node. */
async function withTreePlace<T>(home: Home, request: InitRequest, use: (path: HostPath) => Promise<T>): Promise<T> {
  if (home.record.layerForm === 'tree') return home.withScratch(0, randomHex(16), use)
  const place = await mkdtemp(`${request.scratch === undefined ? tmpdir() : textOf(request.scratch)}/.lsync-init-`)
  try {
    return await use(bytesOf(place) as HostPath)
  } finally {
    withFd(openRoot(bytesOf(dirname(place)) as HostPath), (fd) => removeTree(fd, bytesOf(basename(place))))
  }
}
