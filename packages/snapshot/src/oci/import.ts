import { createHash, type Hash } from 'node:crypto'
import {
  type ConvertProgress,
  decompress,
  type EntryPolicy,
  importLayer,
  LimitExceededError,
  type Namespace,
  OutputExistsError,
  openNew,
  removeTree,
} from '@lsync/overlay-merge'
import {
  type ByteString,
  close,
  fsync,
  type HostPath,
  makeDirectory,
  openRoot,
  RENAME_NOREPLACE,
  randomHex,
  rename,
  syncFileSystem,
  tryRename,
  tryStatAt,
  withFd,
  writeAt,
} from '@lsync/posix'
import { BlobDamagedError, ImageInvalidError } from './errors.ts'
import { type Descriptor, type ImageConfig, layerTypeOf } from './image.ts'
import { type BlobReader, type Image, type ImageChoice, ImageLayout } from './layout.ts'

// gzip cannot pass 1032, and real layers stay below 100. Small ones are let through whatever they claim.
const MAX_RATIO = 1000
const RATIO_FROM_BYTES = 256 << 20

export interface ImageImportRequest extends ImageChoice, EntryPolicy {
  /** The image layout: a directory. */
  readonly layout: HostPath
  /** The directory to make; not there yet. */
  readonly to: HostPath
  /** Whose marks the layers get. Default `trusted`. */
  readonly namespace?: Namespace
  /** Leave out what the file system cannot hold, and report it, instead of failing. */
  readonly lossy?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: ConvertProgress & { readonly layer: number }) => void
}

/** One layer of an image as it was imported. */
export interface ImportedLayer {
  /** A kernel layer. */
  readonly path: HostPath
  readonly digest: string
  /** Digest of the archive without its compression. */
  readonly diffId: string
  readonly entries: number
  /** Content of files. */
  readonly bytes: number
  readonly losses: readonly { readonly path: ByteString; readonly what: string }[]
}

/** The file `image.json` of an imported image. */
export interface ImageRecord {
  readonly version: 1
  readonly manifestDigest: string
  /** Bottom first. */
  readonly layers: readonly ImageRecordLayer[]
  readonly config: ImageConfig
}

export interface ImageRecordLayer {
  readonly directory: string
  readonly digest: string
  readonly diffId: string
}

export interface ImageImportReport {
  readonly digest: string
  readonly config: ImageConfig
  /** Bottom first. */
  readonly layers: readonly ImportedLayer[]
}

/**
 * Makes kernel layers of an image: `TO/layers/1` is the bottom one, and `TO/image.json` says where they are from and
 * how the image is run. `TO` appears whole or not at all. Digests are compared while the blobs are read, those of the
 * archives in them (diff ids), too.
 * @throws {LsyncError} IMAGE_INVALID, IMAGE_NOT_FOUND, BLOB_DAMAGED, OUTPUT_EXISTS, and what `importLayer` throws
 */
export async function importImage(request: ImageImportRequest): Promise<ImageImportReport> {
  const { to, signal } = request
  signal?.throwIfAborted()
  const slash = to.lastIndexOf('/')
  const name = to.slice(slash + 1) as ByteString
  const parent = (slash < 1 ? '/' : to.slice(0, slash)) as HostPath
  const layout = ImageLayout.open(request.layout)
  const parentFd = openRoot(parent)
  const hidden = `.lsync-image-${randomHex(8)}` as ByteString
  try {
    if (tryStatAt(parentFd, name) !== undefined) throw new OutputExistsError(to)
    const image = layout.find(request)
    assertReadable(layout, image)
    makeDirectory(parentFd, hidden, 0o755)
    const layers = await importLayers(request, layout, image, `${parent === '/' ? '' : parent}/${hidden}` as HostPath)
    withFd(openRoot(`${parent}/${hidden}` as HostPath), (fd) => {
      writeRecord(fd, image)
      syncFileSystem(fd)
    })
    publish(parentFd, hidden, name, to)
    fsync(parentFd)
    const report = layers.map((layer, i) => ({ ...layer, path: `${to}/layers/${i + 1}` as HostPath }))
    return { digest: image.descriptor.digest, config: image.config, layers: report }
  } finally {
    removeTree(parentFd, hidden)
    close(parentFd)
    layout.close()
  }
}

/** Before anything is written: layers of another kind (encrypted ones), or blobs that are elsewhere. */
function assertReadable(layout: ImageLayout, { manifest, config }: Image): void {
  if (config.os !== 'linux') throw new ImageInvalidError(layout.path, `it is for ${config.os}`)
  for (const descriptor of manifest.layers) {
    if (layerTypeOf(descriptor.mediaType) === undefined) {
      throw new ImageInvalidError(layout.path, `a layer has the unknown type ${JSON.stringify(descriptor.mediaType)}`)
    }
    layout.openBlob(descriptor).close()
  }
}

async function importLayers(
  request: ImageImportRequest,
  layout: ImageLayout,
  { manifest, config }: Image,
  root: HostPath,
): Promise<Omit<ImportedLayer, 'path'>[]> {
  withFd(openRoot(root), (fd) => makeDirectory(fd, 'layers' as ByteString, 0o755))
  const done: Omit<ImportedLayer, 'path'>[] = []
  const { namespace = 'trusted', devices, setuid, lossy, signal, onProgress } = request
  for (const [i, descriptor] of manifest.layers.entries()) {
    const blob = layout.openBlob(descriptor)
    try {
      const diffId = config.rootfs.diff_ids[i] as string
      const archive = await Archive.of({ blob, descriptor, diffId, layout: layout.path })
      const { entries, bytes, losses } = await importLayer({
        from: archive.chunks(),
        form: 'oci',
        to: `${root}/layers/${i + 1}` as HostPath,
        namespace,
        durable: false,
        beneath: Array.from({ length: i }, (_, below) => `${root}/layers/${i - below}` as HostPath),
        ...(devices === undefined ? {} : { devices }),
        ...(setuid === undefined ? {} : { setuid }),
        ...(lossy === undefined ? {} : { lossy }),
        ...(signal === undefined ? {} : { signal }),
        ...(onProgress === undefined ? {} : { onProgress: (progress) => onProgress({ ...progress, layer: i + 1 }) }),
      })
      await archive.finish()
      done.push({ digest: descriptor.digest, diffId, entries, bytes, losses })
    } finally {
      blob.close()
    }
  }
  return done
}

interface ArchiveSource {
  readonly blob: BlobReader
  readonly descriptor: Descriptor
  readonly diffId: string
  readonly layout: HostPath
}

/** The archive in a blob, hashed and counted while it is read. */
class Archive {
  readonly #blob: BlobReader
  readonly #iterator: AsyncIterator<Uint8Array>
  readonly #descriptor: Descriptor
  readonly #layout: HostPath
  readonly #diffId: string
  readonly #hash: Hash
  #bytes = 0

  private constructor(from: ArchiveSource, chunks: AsyncIterable<Uint8Array>) {
    this.#blob = from.blob
    this.#iterator = chunks[Symbol.asyncIterator]()
    this.#descriptor = from.descriptor
    this.#layout = from.layout
    this.#diffId = from.diffId
    this.#hash = createHash(from.diffId.slice(0, from.diffId.indexOf(':')))
  }

  static async of(from: ArchiveSource): Promise<Archive> {
    // What the bytes say counts, and not the media type, which is wrong in images that exist.
    const { chunks } = await decompress(from.blob.chunks())
    return new Archive(from, chunks)
  }

  /** From where the last one stopped: readers of tar leave at its end, which need not be that of the bytes. */
  async *chunks(): AsyncGenerator<Uint8Array> {
    for (;;) {
      const { done, value } = await this.#iterator.next()
      if (done === true) return
      this.#bytes += value.length
      if (this.#bytes > Math.max(RATIO_FROM_BYTES, MAX_RATIO * this.#descriptor.size)) {
        throw new LimitExceededError(
          this.#descriptor.digest,
          'the ratio of archive bytes to compressed ones',
          MAX_RATIO,
        )
      }
      this.#hash.update(value)
      yield value
    }
  }

  /** Reads what is left. @throws {BlobDamagedError} if the diff id, or the blob's digest, is another */
  async finish(): Promise<void> {
    for await (const _ of this.chunks());
    this.#blob.finish()
    if (!this.#diffId.endsWith(`:${this.#hash.digest('hex')}`)) {
      throw new BlobDamagedError(this.#layout, this.#descriptor.digest, 'its archive is not that of the diff id')
    }
  }
}

function writeRecord(rootFd: number, { descriptor, manifest, config }: Image): void {
  const layers = manifest.layers.map(({ digest }, i) => ({
    directory: `layers/${i + 1}`,
    digest,
    diffId: config.rootfs.diff_ids[i] as string,
  }))
  const record: ImageRecord = { version: 1, manifestDigest: descriptor.digest, layers, config }
  withFd(openNew(rootFd, 'image.json' as ByteString), (fd) =>
    writeAt(fd, 0, Buffer.from(`${JSON.stringify(record, undefined, 2)}\n`)),
  )
}

function publish(parentFd: number, hidden: ByteString, name: ByteString, to: HostPath): void {
  const code = tryRename(parentFd, hidden, parentFd, name, RENAME_NOREPLACE)
  if (code === undefined) return
  if (code === 'EEXIST' || tryStatAt(parentFd, name) !== undefined) throw new OutputExistsError(to)
  // FUSE and network file systems have no such flag.
  rename(parentFd, hidden, parentFd, name)
}
