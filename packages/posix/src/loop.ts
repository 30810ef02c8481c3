import type { ByteString, HostPath } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'
import { allocate, entering, errno, libcFunction } from './native.ts'
import { AT_FDCWD, close, O_RDONLY, O_RDWR, openat, withFd } from './open.ts'

const ioctlNative = libcFunction('ioctl', 'i', 'ipp')

const LOOP_CTL_GET_FREE = 0x4c82
const LOOP_CONFIGURE = 0x4c0a
const LO_FLAGS_READ_ONLY = 1
const LO_FLAGS_AUTOCLEAR = 4
// struct loop_config: fd, block size, struct loop_info64 (flags 52 bytes in), 64 reserved bytes. Source: linux/loop.h.
const CONFIG_BYTES = 304
const FLAGS_AT = 8 + 52

const config = allocate(CONFIG_BYTES)

/**
 * Puts a read-only loop device over an open image. Gives the device's path and an fd of it: the device goes by itself with
 * its last user, so close the fd once it is mounted. Source: loop(4), LOOP_CONFIGURE (Linux 5.8).
 */
export function attachLoop(imageFd: number): { readonly fd: number; readonly path: HostPath } {
  return withFd(openat(AT_FDCWD, '/dev/loop-control' as ByteString, O_RDWR), (control) => {
    for (;;) {
      entering('LOOP_CTL_GET_FREE', '')
      const index = ioctlNative(control, LOOP_CTL_GET_FREE, 0)
      if (index < 0) throw new PosixError(errnoName(errno()), { syscall: 'LOOP_CTL_GET_FREE', path: '' })
      const path = `/dev/loop${index}` as HostPath
      const fd = openat(AT_FDCWD, path, O_RDONLY)
      config.buffer.fill(0)
      config.buffer.writeUInt32LE(imageFd, 0)
      config.buffer.writeUInt32LE(LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR, FLAGS_AT)
      if (ioctlNative(fd, LOOP_CONFIGURE, config.address) >= 0) return { fd, path }
      const code = errnoName(errno())
      close(fd)
      // Somebody else was faster with this one.
      if (code !== 'EBUSY') throw new PosixError(code, { syscall: 'LOOP_CONFIGURE', path })
    }
  })
}
