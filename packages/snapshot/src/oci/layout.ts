import { createHash, type Hash } from 'node:crypto'
import { openNew } from '@lsync/overlay-merge'
import {
  type ByteString,
  bytesOf,
  close,
  errnoOf,
  fsync,
  type HostPath,
  makeDirectory,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  openBeneath,
  openRoot,
  printable,
  randomHex,
  readAt,
  rename,
  setModeFd,
  statFd,
  tryLock,
  tryStatAt,
  tryUnlink,
  withFd,
  writeAt,
} from '@lsync/posix'
import { BlobDamagedError, ImageInvalidError, ImageNotFoundError, LayoutBusyError } from './errors.ts'
import {
  type Descriptor,
  DocumentError,
  hostPlatform,
  type ImageConfig,
  INDEX_TYPE,
  isIndexType,
  isManifestType,
  type Manifest,
  type Platform,
  parseConfig,
  parseIndex,
  parseManifest,
  REF_NAME,
} from './image.ts'

// The specification asks readers to take 4 MiB of a manifest.
const MAX_DOCUMENT_BYTES = 16 << 20
const MAX_INDEX_DEPTH = 4
const PIECE_BYTES = 1 << 20
const FILE_MODE = 0o644
const DIRECTORY = O_RDONLY | O_DIRECTORY | O_NOFOLLOW
const TEMPORARY_PREFIX = '.lsync-'
const LAYOUT_FILE = '{"imageLayoutVersion":"1.0.0"}'

/** An image that was found, its documents read and their digests compared. */
export interface Image {
  readonly descriptor: Descriptor
  readonly manifest: Manifest
  readonly config: ImageConfig
}

/** Which image of a layout is meant. */
export interface ImageChoice {
  /** Its name in the layout (`org.opencontainers.image.ref.name`). Default: the only one. */
  readonly ref?: string
  /** `linux/arm64/v8`. Default: this machine's, if there is a choice. */
  readonly platform?: string
}

/**
 * An OCI image layout. Whoever made it is not trusted: nothing outside of it is opened, symlinks are not followed, and
 * no byte of a blob is believed before all of them have the digest.
 */
export class ImageLayout {
  readonly path: HostPath
  readonly #fd: number
  readonly #blobFds = new Map<string, number>()

  private constructor(path: HostPath, fd: number) {
    this.path = path
    this.#fd = fd
  }

  /** @throws {ImageInvalidError} if the directory is none */
  static open(path: HostPath): ImageLayout {
    const layout = new ImageLayout(path, openRoot(path))
    try {
      const text = layout.#readFile('oci-layout' as ByteString, 4096).toString()
      if (!/"imageLayoutVersion"\s*:\s*"1\.\d+\.\d+"/.test(text)) {
        throw new ImageInvalidError(path, 'its version is unknown')
      }
      return layout
    } catch (error) {
      layout.close()
      if (errnoOf(error) === 'ENOENT') throw new ImageInvalidError(path, 'there is no file oci-layout', error)
      throw error
    }
  }

  /** Makes an empty one, in a directory that is there or not, or opens the one that is there. */
  static create(path: HostPath): ImageLayout {
    const slash = path.lastIndexOf('/')
    withFd(openRoot((path.slice(0, slash) || '/') as HostPath), (parentFd) => {
      const name = path.slice(slash + 1) as ByteString
      if (tryStatAt(parentFd, name) === undefined) makeDirectory(parentFd, name, 0o755)
    })
    const layout = new ImageLayout(path, openRoot(path))
    layout.#blobs('sha256')
    if (tryStatAt(layout.#fd, 'oci-layout' as ByteString) === undefined) {
      layout.#writeFile('oci-layout' as ByteString, Buffer.from(LAYOUT_FILE))
    }
    layout.close()
    return ImageLayout.open(path)
  }

  close(): void {
    for (const fd of this.#blobFds.values()) close(fd)
    this.#blobFds.clear()
    close(this.#fd)
  }

  /** The images at the top of the index. */
  index(): readonly Descriptor[] {
    let text: Buffer
    try {
      text = this.#readFile('index.json' as ByteString, MAX_DOCUMENT_BYTES)
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw error
      return []
    }
    return this.#parsed(() => parseIndex(text.toString()))
  }

  /** @throws {ImageNotFoundError} {ImageInvalidError} {BlobDamagedError} */
  find({ ref, platform }: ImageChoice): Image {
    const top = this.index()
    const names = top.map(({ annotations, digest }) => annotations?.[REF_NAME] ?? digest)
    const named = ref === undefined ? top : top.filter((_, i) => names[i] === ref)
    const wanted = platform === undefined ? undefined : platformOf(platform)
    const choices = named.flatMap((descriptor) => this.#manifestsOf(descriptor, 0))
    const fitting =
      choices.length === 1 && wanted === undefined ? choices : choices.filter(fits(wanted ?? hostPlatform()))
    const [descriptor, another] = fitting
    if (descriptor === undefined || (another !== undefined && ref === undefined && top.length > 1)) {
      const what = `image${ref === undefined ? ' that is the only one' : ` ${ref}`}${platform ? ` for ${platform}` : ''}`
      throw new ImageNotFoundError(
        this.path,
        what,
        names.map((name) => printable(bytesOf(name.slice(0, 200)))),
      )
    }
    const manifest = this.#parsed(() => parseManifest(this.readDocument(descriptor)))
    const config = this.#parsed(() => parseConfig(this.readDocument(manifest.config)))
    if (config.rootfs.diff_ids.length !== manifest.layers.length) {
      throw new ImageInvalidError(this.path, 'manifest and config have not the same number of layers')
    }
    return { descriptor, manifest, config }
  }

  /** The text of a blob, whose digest was compared. */
  readDocument({ digest, size }: Descriptor): string {
    if (size > MAX_DOCUMENT_BYTES) throw new ImageInvalidError(this.path, `${digest} is too large for what it is`)
    const content = this.#readFile(blobPath(digest), MAX_DOCUMENT_BYTES)
    const hash = hashOf(digest).update(content).digest('hex')
    if (content.length !== size || !digest.endsWith(`:${hash}`)) {
      throw new BlobDamagedError(this.path, digest, 'its bytes have another digest')
    }
    return content.toString()
  }

  /** A blob as a stream. Only after its `finish` are the bytes known to be the right ones. */
  openBlob(descriptor: Descriptor): BlobReader {
    const fd = this.#open(blobPath(descriptor.digest))
    return new BlobReader(this.path, fd, descriptor)
  }

  /** Where a blob may be made before its digest is known; `publishBlob` gives it its name. */
  temporaryBlob(): { readonly name: ByteString; readonly path: HostPath } {
    const name = `${TEMPORARY_PREFIX}${randomHex(8)}` as ByteString
    // Through the open directory, so that no symlink in its place leads elsewhere.
    return { name, path: `/proc/self/fd/${this.#blobs('sha256')}/${name}` as HostPath }
  }

  publishBlob(temporary: ByteString, digest: string): void {
    const [algorithm, hash] = partsOf(digest)
    rename(this.#blobs('sha256'), temporary, this.#blobs(algorithm), hash)
  }

  discardBlob(temporary: ByteString): void {
    tryUnlink(this.#blobs('sha256'), temporary)
  }

  /** Stores a document and says what refers to it. */
  writeDocument(mediaType: string, document: object): Descriptor {
    const content = Buffer.from(JSON.stringify(document))
    const digest = `sha256:${createHash('sha256').update(content).digest('hex')}`
    this.#writeFile(partsOf(digest)[1], content, this.#blobs('sha256'))
    return { mediaType, digest, size: content.length }
  }

  /** Copies a blob of another layout, its digest compared. */
  async copyBlob(from: ImageLayout, descriptor: Descriptor, signal?: AbortSignal): Promise<void> {
    const [algorithm, hash] = partsOf(descriptor.digest)
    if (tryStatAt(this.#blobs(algorithm), hash) !== undefined) return
    const { name } = this.temporaryBlob()
    const blob = from.openBlob(descriptor)
    try {
      const fd = openNew(this.#blobs('sha256'), name)
      try {
        let offset = 0
        for await (const piece of blob.chunks()) {
          signal?.throwIfAborted()
          writeAt(fd, offset, piece)
          offset += piece.length
        }
        blob.finish()
        fsync(fd)
      } finally {
        close(fd)
      }
      this.publishBlob(name, descriptor.digest)
    } catch (error) {
      this.discardBlob(name)
      throw error
    } finally {
      blob.close()
    }
  }

  /**
   * Puts an image into the index, in place of the one that had its name. Blobs have to be there, and become durable first.
   * @throws {LayoutBusyError}
   */
  addToIndex(descriptor: Descriptor, ref: string): void {
    if (!tryLock(this.#fd, 'exclusive', this.path)) throw new LayoutBusyError(this.path)
    const others = this.index().filter(({ annotations }) => annotations?.[REF_NAME] !== ref)
    const added = { ...descriptor, annotations: { ...descriptor.annotations, [REF_NAME]: ref } }
    for (const fd of this.#blobFds.values()) fsync(fd)
    withFd(openBeneath(this.#fd, 'blobs' as ByteString, DIRECTORY), (fd) => fsync(fd))
    const index = { schemaVersion: 2, mediaType: INDEX_TYPE, manifests: [...others, added] }
    this.#writeFile('index.json' as ByteString, Buffer.from(JSON.stringify(index)))
    fsync(this.#fd)
  }

  #manifestsOf(descriptor: Descriptor, depth: number): Descriptor[] {
    if (isManifestType(descriptor.mediaType)) return [descriptor]
    if (!isIndexType(descriptor.mediaType)) return []
    if (depth >= MAX_INDEX_DEPTH) throw new ImageInvalidError(this.path, 'an index leads to an index without end')
    const inner = this.#parsed(() => parseIndex(this.readDocument(descriptor)))
    return inner.flatMap((child) => this.#manifestsOf(child, depth + 1))
  }

  #parsed<T>(parse: () => T): T {
    try {
      return parse()
    } catch (error) {
      if (error instanceof DocumentError) throw new ImageInvalidError(this.path, error.message, error.cause)
      throw error
    }
  }

  #open(path: ByteString): number {
    let fd: number
    try {
      fd = openBeneath(this.#fd, path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
    } catch (error) {
      if (errnoOf(error) === 'ENOENT' && path.startsWith('blobs/')) {
        throw new ImageInvalidError(this.path, `${path} is missing`, error)
      }
      if (errnoOf(error) !== 'ELOOP') throw error
      throw new ImageInvalidError(this.path, `${path} is a symlink`, error)
    }
    if (statFd(fd).isFile) return fd
    close(fd)
    throw new ImageInvalidError(this.path, `${path} is no file`)
  }

  #readFile(path: ByteString, limitBytes: number): Buffer {
    return withFd(this.#open(path), (fd) => {
      const { sizeBytes } = statFd(fd)
      if (sizeBytes > limitBytes) throw new ImageInvalidError(this.path, `${path} is longer than ${limitBytes} bytes`)
      return readAt(fd, 0, limitBytes)
    })
  }

  #writeFile(name: ByteString, content: Uint8Array, dirfd = this.#fd): void {
    const temporary = `${TEMPORARY_PREFIX}${randomHex(8)}` as ByteString
    const fd = openNew(dirfd, temporary)
    try {
      writeAt(fd, 0, content)
      setModeFd(fd, FILE_MODE)
      fsync(fd)
      rename(dirfd, temporary, dirfd, name)
    } catch (error) {
      tryUnlink(dirfd, temporary)
      throw error
    } finally {
      close(fd)
    }
  }

  #openDirectory(dirfd: number, name: ByteString): number {
    try {
      return openBeneath(dirfd, name, DIRECTORY)
    } catch (error) {
      if (errnoOf(error) !== 'ENOTDIR' && errnoOf(error) !== 'ELOOP') throw error
      throw new ImageInvalidError(this.path, `${name} is no directory`, error)
    }
  }

  /** The directory of the blobs of an algorithm, made where it is not there yet. */
  #blobs(algorithm: string): number {
    const known = this.#blobFds.get(algorithm)
    if (known !== undefined) return known
    let fd = this.#fd
    for (const name of ['blobs', algorithm] as ByteString[]) {
      if (tryStatAt(fd, name) === undefined) makeDirectory(fd, name, 0o755)
      const next = this.#openDirectory(fd, name)
      if (fd !== this.#fd) close(fd)
      fd = next
    }
    this.#blobFds.set(algorithm, fd)
    return fd
  }
}

/** Reads a blob once, from its beginning, and compares it with its descriptor at the end. */
export class BlobReader {
  readonly #layout: HostPath
  readonly #fd: number
  readonly #descriptor: Descriptor
  readonly #hash: Hash
  #offset = 0

  constructor(layout: HostPath, fd: number, descriptor: Descriptor) {
    this.#layout = layout
    this.#fd = fd
    this.#descriptor = descriptor
    this.#hash = hashOf(descriptor.digest)
  }

  /** From where the last one stopped. @throws {BlobDamagedError} when there is more than the descriptor says */
  async *chunks(): AsyncGenerator<Buffer> {
    for (let piece = this.#next(); piece.length > 0; piece = this.#next()) yield piece
  }

  /** Reads what nobody has asked for. @throws {BlobDamagedError} */
  finish(): void {
    while (this.#next().length > 0);
    const { digest, size } = this.#descriptor
    const isWhole = this.#offset === size && digest.endsWith(`:${this.#hash.digest('hex')}`)
    if (!isWhole) throw new BlobDamagedError(this.#layout, digest, 'its bytes have another digest')
  }

  close(): void {
    close(this.#fd)
  }

  #next(): Buffer {
    const piece = readAt(this.#fd, this.#offset, PIECE_BYTES)
    this.#offset += piece.length
    if (this.#offset > this.#descriptor.size) {
      throw new BlobDamagedError(this.#layout, this.#descriptor.digest, 'it is longer than it should be')
    }
    this.#hash.update(piece)
    return piece
  }
}

function hashOf(digest: string): Hash {
  return createHash(partsOf(digest)[0])
}

/** Algorithm and hexadecimal digits. */
function partsOf(digest: string): [string, ByteString] {
  const colon = digest.indexOf(':')
  return [digest.slice(0, colon), digest.slice(colon + 1) as ByteString]
}

function blobPath(digest: string): ByteString {
  return `blobs/${digest.replace(':', '/')}` as ByteString
}

function platformOf(text: string): Platform {
  const [os = '', architecture = '', variant] = text.split('/')
  return { os, architecture, ...(variant === undefined ? {} : { variant }) }
}

/** Whether a manifest is for a platform; one that names none is for any. */
function fits(wanted: Platform): (descriptor: Descriptor) => boolean {
  return ({ platform }) =>
    platform === undefined ||
    (platform.os === wanted.os &&
      platform.architecture === wanted.architecture &&
      (wanted.variant === undefined || platform.variant === wanted.variant))
}
