import { readFileSync } from 'node:fs'
import type { ByteString, HostPath } from './bytes.ts'
import { readSymlink } from './links.ts'
import { AT_FDCWD, O_PATH, openat, withFd } from './open.ts'
import { type Stat, statFd } from './stat.ts'

/** One line of /proc/PID/mountinfo, every field decoded to bytes. Source: proc_pid_mountinfo(5). */
export interface Mount {
  readonly mountId: number
  readonly parentId: number
  /** The superblock's device in the form of `Stat.dev`; for btrfs not the st_dev of its files. */
  readonly device: Stat['dev']
  /** The directory of the file system that is mounted: `/`, or another for a bind mount or subvolume. */
  readonly root: ByteString
  /** Where it is mounted, as the process sees it. */
  readonly target: HostPath
  /** Options of this mount, such as `ro`, `nosuid`. */
  readonly options: readonly ByteString[]
  /** Propagation, such as `shared:1`. */
  readonly tags: readonly ByteString[]
  /** With the subtype: `fuse.mfs`. */
  readonly type: ByteString
  readonly source: ByteString
  /** Options of the superblock, in the order shown; one name may come more than once (`lowerdir+`). */
  readonly superOptions: readonly MountOption[]
}

/** One option, decoded from octal but with its own escapes (backslashes, colons) still in place. */
export interface MountOption {
  readonly name: ByteString
  readonly value?: ByteString
}

/** The mounts that a process sees, in the kernel's order. Throws when the process is gone or may not be looked at. */
export function readMountInfo(pid: number | 'self' = 'self'): Mount[] {
  return parseMountInfo(readFileSync(`/proc/${pid}/mountinfo`, 'latin1') as ByteString)
}

/** Parses the content of a mountinfo file. Total: a line with too few fields is left out. */
export function parseMountInfo(content: ByteString): Mount[] {
  const mounts: Mount[] = []
  for (const line of content.split('\n')) {
    const fields = line.split(' ')
    const dash = fields.indexOf('-', 6)
    const [mountId, parentId, device, root, target, options] = fields
    const [type, source, superOptions] = fields.slice(dash + 1)
    if (dash < 0 || superOptions === undefined || options === undefined) continue
    const [major, minor] = (device as string).split(':')
    mounts.push({
      mountId: Number(mountId),
      parentId: Number(parentId),
      device: Number(major) * 0x1_0000_0000 + Number(minor),
      root: decodeOctal(root as string),
      target: decodeOctal(target as string) as HostPath,
      options: options.split(',').map(decodeOctal),
      tags: fields.slice(6, dash).map(decodeOctal),
      type: decodeOctal(type as string),
      source: decodeOctal(source as string),
      // Commas inside values are written as \054, so this split comes before any decoding.
      superOptions: superOptions.split(',').map(parseOption),
    })
  }
  return mounts
}

function parseOption(option: string): MountOption {
  const equals = option.indexOf('=')
  if (equals < 0) return { name: decodeOctal(option) }
  return { name: decodeOctal(option.slice(0, equals)), value: decodeOctal(option.slice(equals + 1)) }
}

function decodeOctal(field: string): ByteString {
  if (!field.includes('\\')) return field as ByteString
  return field.replace(/\\([0-3][0-7]{2})/g, (_, digits) =>
    String.fromCharCode(Number.parseInt(digits, 8)),
  ) as ByteString
}

/** The mount that an open file was reached through; `undefined` when this process does not see it (detached). */
export function mountOf(fd: number, mounts: readonly Mount[] = readMountInfo()): Mount | undefined {
  const { mountId } = statFd(fd)
  return mounts.find((mount) => mount.mountId === mountId)
}

/**
 * The mounts strictly beneath a directory, as this process sees them, in the kernel's order. Symlinks in `path` are
 * followed. A mount on `path` itself is not one of them.
 */
export function mountsBeneath(path: HostPath): Mount[] {
  const real = realPath(path)
  const prefix = real === '/' ? '/' : `${real}/`
  return readMountInfo().filter(({ target }) => target.startsWith(prefix) && target !== real)
}

/** The absolute path, without symlinks, that the kernel has for what `path` names. */
export function realPath(path: HostPath): HostPath {
  return withFd(openat(AT_FDCWD, path, O_PATH), pathOfFd)
}

/** The path by which an open file is reached now (readlink of /proc/self/fd/N). */
export function pathOfFd(fd: number): HostPath {
  return readSymlink(AT_FDCWD, `/proc/self/fd/${fd}` as ByteString) as HostPath
}

/** What a layer is to an overlay mount. */
export type LayerRole = 'upper' | 'work' | 'lower' | 'data'

/** One layer of an overlay mount. `paths` holds every reading of the option, the likeliest first. */
export interface OverlayLayer {
  readonly role: LayerRole
  readonly paths: readonly HostPath[]
  /** Shown as `/`, which is also what the root of a mount that is mounted nowhere looks like. */
  readonly mayBeNowhere?: true
}

/**
 * The layers of an overlay mount in the order of its options (lowers top first), empty for other mounts. Paths are as
 * they were given to the mount: perhaps relative, of another root, or renamed since.
 *
 * `upperdir` and `workdir` have two readings when they hold a backslash: given as text, they were escaped; given as an
 * fd (FSCONFIG_SET_FD), the kernel shows the path as it is, and the line does not tell which (seen on 6.18).
 */
export function overlayLayers(mount: Mount): OverlayLayer[] {
  if (mount.type !== 'overlay') return []
  return mount.superOptions.flatMap(({ name, value }): OverlayLayer[] => {
    if (value === undefined) return []
    if (name === 'lowerdir') return parseLowers(value)
    const role = ROLES_OF_FDS[name]
    if (role === undefined) return []
    const paths = name.endsWith('+') ? [value as HostPath] : readings(value)
    return [{ role, paths, ...(value === '/' ? { mayBeNowhere: true } : {}) }]
  })
}

/** The options that take an fd, too. */
const ROLES_OF_FDS: Readonly<Record<string, LayerRole>> = {
  'lowerdir+': 'lower',
  'datadir+': 'data',
  upperdir: 'upper',
  workdir: 'work',
}

function readings(value: ByteString): HostPath[] {
  return [...new Set([withoutBackslashes(value), value as HostPath])]
}

function withoutBackslashes(value: string): HostPath {
  return value.replace(/\\([\s\S])/g, '$1') as HostPath
}

/** `l1:l2::d1`: layers end at a colon without a backslash before it, and an empty one starts the data-only layers. */
function parseLowers(value: ByteString): OverlayLayer[] {
  const layers: OverlayLayer[] = []
  let role: LayerRole = 'lower'
  for (const [part] of value.matchAll(/(?:[^\\:]|\\[\s\S]|\\$)+|::?/g)) {
    if (part === ':') continue
    if (part === '::') role = 'data'
    else layers.push({ role, paths: [withoutBackslashes(part)] })
  }
  return layers
}
