import {
  AT_FDCWD,
  type ByteString,
  close,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  getInodeFlags,
  type HostPath,
  link,
  makeDevice,
  makeDirectory,
  makeNode,
  makeSymlink,
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  openat,
  openBeneath,
  openRoot,
  readDirents,
  removeDirectory,
  S_IFBLK,
  S_IFCHR,
  S_IFIFO,
  S_IFSOCK,
  setInodeFlags,
  setModeAt,
  setModeFd,
  setOwner,
  setTimes,
  setXattr,
  truncate,
  tryStatAt,
  tryUnlink,
  withFd,
  writeAt,
} from '@lsync/posix'

/** What every spec may say of its inode; the rest is a default. */
export interface Attributes {
  readonly mode?: number
  readonly uid?: number
  readonly gid?: number
  readonly mtimeNs?: bigint
  /** By full name; strings are latin1. */
  readonly xattrs?: Readonly<Record<string, string>>
  /** Overlay marks without the prefix: `{ opaque: 'y' }` is `trusted.overlay.opaque` or `user.overlay.opaque`. */
  readonly marks?: Readonly<Record<string, string>>
  readonly flags?: 'i' | 'a' | 'ia'
}

/** One raw name of one layer, as a test writes it down. */
export type Spec = Attributes &
  (
    | { readonly kind: 'directory'; readonly children: Readonly<Record<string, Spec>> }
    | { readonly kind: 'file'; readonly pieces: readonly (readonly [number, string])[]; readonly sizeBytes: number }
    | { readonly kind: 'symlink'; readonly target: string }
    | { readonly kind: 'node'; readonly type: number; readonly rdev: number }
    | { readonly kind: 'link'; readonly to: string }
  )
export type DirectorySpec = Extract<Spec, { kind: 'directory' }>

type Children = Readonly<Record<string, Spec>>

export function dir(children: Children = {}, attributes: Attributes = {}): DirectorySpec {
  return { kind: 'directory', children, ...attributes }
}

/** A directory that shows nothing of the layers beneath. */
export function opaque(children: Children = {}, attributes: Attributes = {}): DirectorySpec {
  return dir(children, { ...attributes, marks: { ...attributes.marks, opaque: 'y' } })
}

/** A directory that merges with the one named `to` beneath: one component, or an absolute path. */
export function redirected(to: string, children: Children = {}, attributes: Attributes = {}): DirectorySpec {
  return dir(children, { ...attributes, marks: { ...attributes.marks, redirect: to } })
}

export function file(content = '', attributes: Attributes = {}): Spec {
  return { kind: 'file', pieces: content === '' ? [] : [[0, content]], sizeBytes: content.length, ...attributes }
}

/** A file of `sizeBytes` with data only where `pieces` says (offset, text). */
export function sparse(sizeBytes: number, pieces: readonly (readonly [number, string])[] = [], more: Attributes = {}) {
  return { kind: 'file', pieces, sizeBytes, ...more } satisfies Spec
}

/** Metadata alone; the data lies beneath under the same name or `redirect`. */
export function metacopy(sizeBytes: number, { redirect, ...more }: Attributes & { redirect?: string } = {}): Spec {
  const marks = { ...more.marks, metacopy: '', ...(redirect === undefined ? {} : { redirect }) }
  return { kind: 'file', pieces: [], sizeBytes, ...more, marks }
}

export function whiteout(): Spec {
  return { kind: 'node', type: S_IFCHR, rdev: 0, mode: 0 }
}

export function xattrWhiteout(): Spec {
  return file('', { marks: { whiteout: 'y' } })
}

export function symlink(target: string, attributes: Attributes = {}): Spec {
  return { kind: 'symlink', target, ...attributes }
}

export function fifo(attributes: Attributes = {}): Spec {
  return { kind: 'node', type: S_IFIFO, rdev: 0, ...attributes }
}

export function socket(attributes: Attributes = {}): Spec {
  return { kind: 'node', type: S_IFSOCK, rdev: 0, ...attributes }
}

export function character(major: number, minor: number, attributes: Attributes = {}): Spec {
  return { kind: 'node', type: S_IFCHR, rdev: makeDevice(major, minor), ...attributes }
}

export function block(major: number, minor: number, attributes: Attributes = {}): Spec {
  return { kind: 'node', type: S_IFBLK, rdev: makeDevice(major, minor), ...attributes }
}

/** A further name of the inode at `to`, a path from the root of the same tree. */
export function linkTo(to: string): Spec {
  return { kind: 'link', to }
}

export interface BuildOptions {
  readonly namespace?: 'trusted' | 'user'
  /** Seconds since 1970 from which the default times of this tree are counted, so that layers differ. */
  readonly epoch?: number
}

/** Makes the tree in the directory `root`, which is created if need be. Names are bytes (latin1 strings). */
export function buildTree(root: string, spec: DirectorySpec, options: BuildOptions = {}): void {
  if (tryStatAt(AT_FDCWD, root as ByteString) === undefined) makeDirectory(AT_FDCWD, root as ByteString, 0o755)
  const build = new Build(options)
  withFd(openRoot(root as HostPath), (fd) => {
    build.fill(fd, spec, '')
    for (const { parent, name, to } of build.links) {
      withFd(openBeneath(fd, parent as ByteString, O_RDONLY | O_DIRECTORY), (toDir) =>
        withFd(openParent(fd, to), (fromDir) => link(fromDir, baseName(to), toDir, name)),
      )
    }
    // Deepest first, and after all names are there: making a name changes its directory's time.
    for (const finish of build.directories.reverse()) {
      withFd(openBeneath(fd, finish.path as ByteString, O_RDONLY | O_DIRECTORY), (directory) =>
        setTimes(directory, '', finish.mtimeNs, finish.mtimeNs),
      )
    }
    for (const { path, flags } of build.flags) setFlags(fd, path, flags)
  })
}

function openParent(root: number, path: string): number {
  const slash = path.lastIndexOf('/')
  return openBeneath(root, (slash < 0 ? '' : path.slice(0, slash)) as ByteString, O_RDONLY | O_DIRECTORY)
}

function baseName(path: string): ByteString {
  return path.slice(path.lastIndexOf('/') + 1) as ByteString
}

function setFlags(root: number, path: string, flags: string): void {
  const bits = (flags.includes('i') ? FS_IMMUTABLE_FL : 0) | (flags.includes('a') ? FS_APPEND_FL : 0)
  withFd(openBeneath(root, path as ByteString, O_RDONLY | O_NONBLOCK), (fd) =>
    setInodeFlags(fd, getInodeFlags(fd) | bits),
  )
}

class Build {
  readonly links: { parent: string; name: ByteString; to: string }[] = []
  readonly directories: { path: string; mtimeNs: bigint }[] = []
  readonly flags: { path: string; flags: string }[] = []
  readonly #prefix: string
  readonly #epoch: number

  constructor(options: BuildOptions) {
    this.#prefix = `${options.namespace ?? 'trusted'}.overlay.`
    this.#epoch = options.epoch ?? 1_600_000_000
  }

  fill(fd: number, spec: DirectorySpec, path: string): void {
    // Attributes that mkdir or a parent's default ACL would inherit are set after the children exist, not before.
    this.directories.push({ path, mtimeNs: spec.mtimeNs ?? this.#defaultTime(path) })
    for (const [key, child] of Object.entries(spec.children)) {
      this.#make(fd, key as ByteString, child, path === '' ? key : `${path}/${key}`)
    }
    setOwner(fd, '', spec.uid ?? 0, spec.gid ?? 0)
    setModeFd(fd, spec.mode ?? 0o755)
    this.#setXattrs(fd, '', spec)
    if (spec.flags !== undefined) this.flags.push({ path, flags: spec.flags })
  }

  #make(parent: number, name: ByteString, spec: Spec, path: string): void {
    switch (spec.kind) {
      case 'link':
        this.links.push({ parent: path.slice(0, Math.max(0, path.length - name.length - 1)), name, to: spec.to })
        return
      case 'directory':
        makeDirectory(parent, name, 0o755)
        withFd(openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (fd) => this.fill(fd, spec, path))
        return
      case 'file':
        withFd(openat(parent, name, O_RDWR | O_CREAT | O_EXCL, 0o600), (fd) => {
          for (const [offset, text] of spec.pieces) writeAt(fd, offset, Buffer.from(text, 'latin1'))
          truncate(fd, spec.sizeBytes)
        })
        break
      case 'symlink':
        makeSymlink(spec.target as ByteString, parent, name)
        break
      case 'node':
        makeNode(parent, name, spec.type | 0o600, spec.rdev)
        break
    }
    setOwner(parent, name, spec.uid ?? 0, spec.gid ?? 0)
    if (spec.kind !== 'symlink') setModeAt(parent, name, spec.mode ?? 0o644)
    this.#setXattrs(parent, name, spec)
    const mtimeNs = spec.mtimeNs ?? this.#defaultTime(path)
    setTimes(parent, name, mtimeNs, mtimeNs)
    if (spec.flags !== undefined) this.flags.push({ path, flags: spec.flags })
  }

  #setXattrs(fd: number, name: ByteString | '', spec: Spec): void {
    for (const [key, value] of Object.entries(spec.xattrs ?? {})) {
      setXattr(fd, name, key as ByteString, Buffer.from(value, 'latin1'))
    }
    for (const [key, value] of Object.entries(spec.marks ?? {})) {
      setXattr(fd, name, `${this.#prefix}${key}` as ByteString, Buffer.from(value, 'latin1'))
    }
  }

  /** Different for every path, with odd nanoseconds, and the same in every run. */
  #defaultTime(path: string): bigint {
    let hash = 7
    for (let i = 0; i < path.length; i++) hash = (hash * 31 + path.charCodeAt(i)) % 999_999_937
    return BigInt(this.#epoch + (hash % 10_000)) * 1_000_000_000n + BigInt(hash)
  }
}

/** Removes a tree whatever stands in it, immutable files too. Nothing there is fine. */
export function removeTree(path: string): void {
  const slash = path.lastIndexOf('/')
  withFd(openRoot(path.slice(0, slash) as HostPath), (fd) => removeBeneath(fd, path.slice(slash + 1) as ByteString))
}

/** Removes what `name` beneath `dirfd` holds, the name included. */
export function removeBeneath(dirfd: number, name: ByteString): void {
  const stat = tryStatAt(dirfd, name)
  if (stat === undefined) return
  if (stat.isDirectory || stat.isFile) clearFlags(dirfd, name)
  if (!stat.isDirectory) {
    tryUnlink(dirfd, name)
    return
  }
  const names: ByteString[] = []
  withFd(openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (fd) => {
    readDirents(fd, (child) => names.push(child))
    for (const child of names) removeBeneath(fd, child)
  })
  removeDirectory(dirfd, name)
}

function clearFlags(dirfd: number, name: ByteString): void {
  const fd = openat(dirfd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
  try {
    const flags = getInodeFlags(fd)
    if (flags & (FS_IMMUTABLE_FL | FS_APPEND_FL)) setInodeFlags(fd, flags & ~(FS_IMMUTABLE_FL | FS_APPEND_FL))
  } finally {
    close(fd)
  }
}
