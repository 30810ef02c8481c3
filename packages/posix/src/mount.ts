import type { ByteString, HostPath } from './bytes.ts'
import { errnoName, errnoOf, PosixError } from './errors.ts'
import { pathOfFd } from './mountinfo.ts'
import { allocate, cString, entering, errno, libcFunction } from './native.ts'
import { AT_FDCWD, close, O_CLOEXEC, O_PATH, openat, withFd } from './open.ts'
import { statFd, tryStatAt } from './stat.ts'

const openTreeNative = libcFunction('syscall', 'l', 'lipu')
const moveMountNative = libcFunction('syscall', 'l', 'lipipu')
const fsopenNative = libcFunction('syscall', 'l', 'lpu')
const fsconfigNative = libcFunction('syscall', 'l', 'liuppi')
const fsmountNative = libcFunction('syscall', 'l', 'liuu')
const mountSetattrNative = libcFunction('syscall', 'l', 'lipupp')
const umountNative = libcFunction('umount2', 'i', 'pi')
const mountNative = libcFunction('mount', 'i', 'ppppp')
const readNative = libcFunction('read', 'l', 'ipp')

// The same on every architecture.
const SYS_open_tree = 428
const SYS_move_mount = 429
const SYS_fsopen = 430
const SYS_fsconfig = 431
const SYS_fsmount = 432
const SYS_mount_setattr = 442

const OPEN_TREE_CLONE = 1
const AT_EMPTY_PATH = 0x1000
const AT_RECURSIVE = 0x8000
const MOVE_MOUNT_F_EMPTY_PATH = 0x04
const MOVE_MOUNT_T_EMPTY_PATH = 0x40
const MOVE_MOUNT_BENEATH = 0x200
const FSOPEN_CLOEXEC = 1
const FSMOUNT_CLOEXEC = 1
const FSCONFIG_SET_FLAG = 0
const FSCONFIG_SET_STRING = 1
const FSCONFIG_SET_FD = 5
const FSCONFIG_CMD_CREATE = 6
const MNT_DETACH = 2
const UMOUNT_NOFOLLOW = 8
const MS_REMOUNT = 32
const MS_BIND = 4096
const MS_REC = 16384

// mount(2) silently cuts a longer option string and may then mount another directory (overlay-format §9, R30).
const MOUNT_OPTION_BYTES = 4095
const CONFIG_STRING_BYTES = 255

/** Options that belong to the mount and not to the file system: the bit of mount_setattr(2) and that of mount(2). */
const ATTRIBUTES: Readonly<Record<string, readonly [attribute: number, flag: number]>> = {
  ro: [0x1, 1],
  nosuid: [0x2, 2],
  nodev: [0x4, 4],
  noexec: [0x8, 8],
  noatime: [0x10, 1024],
  strictatime: [0x20, 1 << 24],
  nodiratime: [0x80, 2048],
  nosymfollow: [0x0020_0000, 256],
}

/** A directory or file: by path (symlinks are followed: the caller vouches for it), or by an open fd (O_PATH will do). */
export type Place = HostPath | number

/** Options as mount(8) takes them: `true` for a flag. `ro`, `nosuid`, `nodev`, `noexec`, `noatime` and so on included. */
export type MountOptions = Readonly<Record<string, string | true>>

/** What an overlay is made of. `lowers` are top first, `dataLowers` (data-only layers) lie below them. */
export interface OverlayStack {
  readonly lowers: readonly Place[]
  readonly dataLowers?: readonly Place[] | undefined
  readonly upper?: Place | undefined
  readonly work?: Place | undefined
  /** Such as `{ userxattr: true, index: 'on', redirect_dir: 'on' }`. */
  readonly options?: MountOptions | undefined
  readonly readOnly?: boolean | undefined
}

/**
 * How an overlay was mounted: layers as fds (Linux 6.13), layers as text one by one (6.8, at most 255 bytes each), or
 * mount(2) (older; at most 4095 bytes in all).
 */
export type MountWay = 'fd' | 'string' | 'mount(2)'

const WAYS: readonly MountWay[] = ['fd', 'string', 'mount(2)']
let onlyWay: MountWay | undefined
let takesFds = false

/** Makes overlays be mounted in one way only, for tests of the older ones; `undefined` lets the kernel decide. */
export function useMountWay(way: MountWay | undefined): void {
  onlyWay = way
}

/** A way of mounting that this kernel lacks, or that cannot carry these layers: the next one is tried. */
class WayMissing extends Error {}

/**
 * Mounts an overlay. Layer paths need no escaping, from Linux 6.13 on they may be as long as any path (4095 bytes), and
 * all together have no limit. Layers may be fds.
 * @throws {PosixError} with the kernel's own words as far as it gives them (the rest is in dmesg); ENAMETOOLONG where
 *   an older kernel would cut the options
 */
export function mountOverlay(stack: OverlayStack, target: Place): MountWay {
  for (const way of onlyWay === undefined ? WAYS : [onlyWay]) {
    try {
      if (way === 'mount(2)') mountOverlayOld(stack, target)
      else withFd(createOverlayBy(way, stack), (mountFd) => attachMount(mountFd, target))
      return way
    } catch (cause) {
      if (!(cause instanceof WayMissing)) throw cause
    }
  }
  throw new PosixError('ENOSYS', { syscall: 'fsopen', path: 'overlay' })
}

/**
 * An overlay that is mounted nowhere: the fd (O_PATH) of its root. It can be walked beneath the fd, attached with
 * `attachMount`, and is gone once the fd is closed. Needs the new mount API (Linux 6.8).
 */
export function createOverlay(stack: OverlayStack): number {
  for (const way of ['fd', 'string'] as const) {
    if (onlyWay !== undefined && way !== onlyWay) continue
    try {
      return createOverlayBy(way, stack)
    } catch (cause) {
      if (!(cause instanceof WayMissing)) throw cause
    }
  }
  throw new PosixError('ENOSYS', { syscall: 'fsopen', path: 'overlay' })
}

function createOverlayBy(way: 'fd' | 'string', stack: OverlayStack): number {
  return withContext('overlay', (context) => {
    const set = (key: string, place: Place) =>
      way === 'fd' ? setLayerFd(context, key, place) : setLayerText(context, key, place)
    setString(context, 'source', 'overlay')
    for (const lower of stack.lowers) set('lowerdir+', lower)
    for (const lower of stack.dataLowers ?? []) set('datadir+', lower)
    if (stack.upper !== undefined) set('upperdir', stack.upper)
    if (stack.work !== undefined) set('workdir', stack.work)
    const options: MountOptions = { ...stack.options, ...(stack.readOnly ? { ro: true } : {}) }
    return finish(context, 'overlay', options)
  })
}

function setLayerFd(context: number, key: string, place: Place): void {
  withPlace(place, (fd, path) => {
    if (fsconfigNative(SYS_fsconfig, context, FSCONFIG_SET_FD, cString(key), 0, fd) >= 0) {
      takesFds = true
      return
    }
    const code = errnoName(errno())
    // Before 6.13 the options are text only. Once one was taken as an fd, EINVAL is about the layer.
    if (code === 'EINVAL' && !takesFds) throw new WayMissing()
    throw contextError(context, code, `fsconfig ${key}`, path)
  })
}

function setLayerText(context: number, key: string, place: Place): void {
  const path = pathOfPlace(place)
  // Layers with + are literal; upperdir and workdir are unescaped by the kernel.
  const text = key.endsWith('+') ? path : path.replaceAll('\\', '\\\\')
  if (text.length > CONFIG_STRING_BYTES) throw new WayMissing()
  if (fsconfigNative(SYS_fsconfig, context, FSCONFIG_SET_STRING, cString(key), cString(text, 1), 0) >= 0) return
  const code = errnoName(errno())
  const error = contextError(context, code, `fsconfig ${key}`, path)
  if (code === 'EINVAL' && /unknown parameter/i.test(error.message)) throw new WayMissing()
  throw error
}

function mountOverlayOld(stack: OverlayStack, target: Place): void {
  const join = (places: readonly Place[] | undefined, separator: string) =>
    (places ?? []).map((place) => separator + pathOfPlace(place).replace(/[\\:,]/g, '\\$&')).join('')
  const layers: Record<string, string> = {
    lowerdir: `${join(stack.lowers, ':').slice(1)}${join(stack.dataLowers, '::')}`,
  }
  if (stack.upper !== undefined) layers['upperdir'] = pathOfPlace(stack.upper).replace(/[\\,]/g, '\\$&')
  if (stack.work !== undefined) layers['workdir'] = pathOfPlace(stack.work).replace(/[\\,]/g, '\\$&')
  mountOld('overlay', 'overlay', target, { ...layers, ...stack.options, ...(stack.readOnly ? { ro: true } : {}) })
}

/**
 * Mounts a file system of any type: `source` is a device, an image (EROFS from Linux 6.12 on) or whatever the type takes.
 * By the new mount API, or by mount(2) where that is missing or the source is longer than 255 bytes.
 */
export function mountFileSystem(
  type: string,
  source: HostPath | undefined,
  target: Place,
  options: MountOptions = {},
): void {
  try {
    withFd(createFileSystem(type, source, options), (mountFd) => attachMount(mountFd, target))
  } catch (cause) {
    if (!(cause instanceof PosixError) || (cause.code !== 'ENOSYS' && cause.syscall !== 'fsconfig source')) throw cause
    if (cause.code !== 'ENOSYS' && cause.code !== 'EINVAL') throw cause
    mountOld(type, source ?? type, target, options)
  }
}

/** As `mountFileSystem`, but mounted nowhere: the fd (O_PATH) of its root, gone once it is closed. */
export function createFileSystem(type: string, source: HostPath | undefined, options: MountOptions = {}): number {
  return withContext(type, (context) => {
    if (source !== undefined) setString(context, 'source', source)
    return finish(context, source ?? type, options)
  })
}

/** Attaches a mount that is mounted nowhere (`createOverlay`); `beneath` puts it under what is mounted on the target. */
export function attachMount(mountFd: number, target: Place, options: { readonly beneath?: boolean } = {}): void {
  withPlace(target, (targetFd, path) => {
    entering('move_mount', path)
    const flags =
      MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH | (options.beneath === true ? MOVE_MOUNT_BENEATH : 0)
    if (moveMountNative(SYS_move_mount, mountFd, cString(''), targetFd, cString('', 1), flags) < 0) {
      throw new PosixError(errnoName(errno()), { syscall: 'move_mount', path })
    }
  })
}

/** Makes what `source` names visible at `target` too. `recursive` takes the mounts beneath it along. */
export function bindMount(
  source: Place,
  target: Place,
  options: { readonly recursive?: boolean; readonly readOnly?: boolean } = {},
): void {
  const { recursive = false, readOnly = false } = options
  withPlace(source, (sourceFd, path) => {
    entering('open_tree', path)
    const flags = OPEN_TREE_CLONE | O_CLOEXEC | AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0)
    const tree = openTreeNative(SYS_open_tree, sourceFd, cString(''), flags)
    if (tree >= 0) {
      withFd(tree, () => {
        if (readOnly) setMountAttributes(tree, { set: ['ro'], recursive })
        attachMount(tree, target)
      })
      return
    }
    const code = errnoName(errno())
    if (code !== 'ENOSYS') throw new PosixError(code, { syscall: 'open_tree', path })
    const from = `/proc/self/fd/${sourceFd}`
    mountCall('', from, target, MS_BIND | (recursive ? MS_REC : 0), '')
    if (readOnly) mountCall('', from, target, MS_BIND | MS_REMOUNT | 1, '')
  })
}

/** Propagation of a mount. Source: mount_namespaces(7), "Shared subtrees". */
export type Propagation = 'private' | 'shared' | 'slave' | 'unbindable'

const PROPAGATION: Readonly<Record<Propagation, number>> = {
  unbindable: 1 << 17,
  private: 1 << 18,
  slave: 1 << 19,
  shared: 1 << 20,
}

const attributes = allocate(32)

/** Sets and clears options of the mount at `place`, such as `ro` and `nosuid`, and its propagation: mount_setattr(2). */
export function setMountAttributes(
  place: Place,
  change: {
    readonly set?: readonly string[]
    readonly clear?: readonly string[]
    readonly propagation?: Propagation
    readonly recursive?: boolean
  },
): void {
  const bits = (names: readonly string[] = []) => {
    const values = names.map((name) => ATTRIBUTES[name]?.[0])
    if (values.includes(undefined)) throw new Error(`not an attribute of a mount: ${names.join()}`)
    return BigInt((values as number[]).reduce((sum, value) => sum | value, 0))
  }
  withPlace(place, (fd, path) => {
    entering('mount_setattr', path)
    attributes.buffer.fill(0)
    attributes.buffer.writeBigUInt64LE(bits(change.set), 0)
    attributes.buffer.writeBigUInt64LE(bits(change.clear), 8)
    if (change.propagation !== undefined) {
      attributes.buffer.writeBigUInt64LE(BigInt(PROPAGATION[change.propagation]), 16)
    }
    const flags = AT_EMPTY_PATH | (change.recursive === true ? AT_RECURSIVE : 0)
    if (mountSetattrNative(SYS_mount_setattr, fd, cString(''), flags, attributes.address, 32) < 0) {
      throw new PosixError(errnoName(errno()), { syscall: 'mount_setattr', path })
    }
  })
}

/**
 * umount2(2) of the topmost mount on `path`, which is not followed if it is a symlink. `lazy` takes it out of sight at
 * once; it lives on until its last user lets go, and an overlay's layers stay in use until then.
 */
export function unmount(path: HostPath, options: { readonly lazy?: boolean } = {}): void {
  entering('umount2', path)
  if (umountNative(cString(path), UMOUNT_NOFOLLOW | (options.lazy === true ? MNT_DETACH : 0)) < 0) {
    throw new PosixError(errnoName(errno()), { syscall: 'umount2', path })
  }
}

function withContext(type: string, use: (context: number) => number): number {
  entering('fsopen', type)
  const context = fsopenNative(SYS_fsopen, cString(type), FSOPEN_CLOEXEC)
  if (context >= 0) return withFd(context, use)
  const code = errnoName(errno())
  if (code === 'ENOSYS' && type === 'overlay') throw new WayMissing()
  throw new PosixError(code, { syscall: 'fsopen', path: type })
}

function setString(context: number, key: string, value: string, about = value): void {
  if (fsconfigNative(SYS_fsconfig, context, FSCONFIG_SET_STRING, cString(key), cString(value, 1), 0) < 0) {
    throw contextError(context, errnoName(errno()), `fsconfig ${key}`, about)
  }
}

/** Sets the options, makes the file system, and returns the fd of its mount. */
function finish(context: number, about: string, options: MountOptions): number {
  let mountAttributes = 0
  for (const [name, value] of Object.entries(options)) {
    const attribute = ATTRIBUTES[name]
    if (attribute !== undefined) mountAttributes |= attribute[0]
    // `ro` is an option of both.
    if (attribute !== undefined && name !== 'ro') continue
    if (value !== true) setString(context, name, value, about)
    else if (fsconfigNative(SYS_fsconfig, context, FSCONFIG_SET_FLAG, cString(name), 0, 0) < 0) {
      throw contextError(context, errnoName(errno()), `fsconfig ${name}`, about)
    }
  }
  if (fsconfigNative(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, 0, 0, 0) < 0) {
    throw contextError(context, errnoName(errno()), 'fsconfig create', about)
  }
  const mountFd = fsmountNative(SYS_fsmount, context, FSMOUNT_CLOEXEC, mountAttributes)
  if (mountFd < 0) throw contextError(context, errnoName(errno()), 'fsmount', about)
  return mountFd
}

const logOut = allocate(4096)

/** The kernel keeps its messages (`e overlay: ...`) in the context, one a read. */
function contextError(context: number, code: string, syscall: string, path: string): PosixError {
  const lines: string[] = []
  for (;;) {
    const length = readNative(context, logOut.address, logOut.buffer.length)
    if (length <= 0) break
    lines.push(
      logOut.buffer
        .toString('latin1', 0, length)
        .replace(/^[ewi] /, '')
        .trim(),
    )
  }
  const hint = lines.length === 0 ? SILENT[code] : undefined
  return new PosixError(code, { syscall, path, reason: lines.join('; '), ...(hint === undefined ? {} : { hint }) })
}

/** What overlayfs means by an errno that it explains in dmesg alone. */
const SILENT: Readonly<Record<string, string>> = {
  EINVAL: 'dmesg has the reason',
  EBUSY: 'unmount the overlay that uses one of these layers',
  ELOOP: 'give each layer once, and none inside another',
  ESTALE: 'the upper belongs to other lowers, or the work directory to another upper',
}

function mountOld(type: string, source: string, target: Place, options: MountOptions): void {
  let flags = 0
  const rest: string[] = []
  for (const [name, value] of Object.entries(options)) {
    const attribute = ATTRIBUTES[name]
    if (attribute !== undefined) flags |= attribute[1]
    else rest.push(value === true ? name : `${name}=${value}`)
  }
  mountCall(type, source, target, flags, rest.join(','))
}

function mountCall(type: string, source: string, target: Place, flags: number, data: string): void {
  withPlace(target, (targetFd, path) => {
    entering('mount', path)
    if (data.length > MOUNT_OPTION_BYTES) {
      throw new PosixError('ENAMETOOLONG', {
        syscall: 'mount',
        path,
        hint: 'use fewer layers or shorter paths, or Linux 6.13, which takes layers of any length',
      })
    }
    const [sourceArea, typeArea, dataArea] = [source, type, data].map((text) => {
      const area = allocate(text.length + 1)
      area.buffer.write(text, 0, 'latin1')
      return area
    })
    const result = mountNative(
      sourceArea?.address ?? 0,
      cString(`/proc/self/fd/${targetFd}`),
      typeArea?.address ?? 0,
      flags,
      dataArea?.address ?? 0,
    )
    if (result < 0) throw new PosixError(errnoName(errno()), { syscall: 'mount', path, hint: 'dmesg has the reason' })
  })
}

function withPlace<T>(place: Place, use: (fd: number, path: string) => T): T {
  if (typeof place === 'number') return use(place, describe(place))
  const fd = openat(AT_FDCWD, place, O_PATH)
  try {
    return use(fd, place)
  } finally {
    close(fd)
  }
}

/** For messages: what is deeper than PATH_MAX has no path that the kernel would tell. */
function describe(fd: number): string {
  try {
    return pathOfFd(fd)
  } catch (cause) {
    if (errnoOf(cause) === undefined) throw cause
    return `fd ${fd}`
  }
}

/**
 * A path for ways of mounting that take no fd.
 * @throws {PosixError} ESTALE when the open file has none, being deleted or in a detached mount: the kernel gives those
 *   paths too, and they may be those of other directories
 */
function pathOfPlace(place: Place): ByteString {
  if (typeof place !== 'number') return place
  const path = pathOfFd(place)
  const expected = statFd(place)
  const found = tryStatAt(AT_FDCWD, path)
  if (found?.ino !== expected.ino || found.dev !== expected.dev || found.mountId !== expected.mountId) {
    throw new PosixError('ESTALE', { syscall: 'mount', path, reason: 'the open directory has no path here' })
  }
  return path
}
