import koffi from 'koffi'
import { expect, test } from 'vitest'
import { errnoName } from './errors.ts'
import { errno, libcFunction } from './native.ts'

const close = libcFunction('close', 'i', 'i')
const openat2 = libcFunction('syscall', 'l', 'lipppp')
const SYS_openat2 = 437

test('the errno of a failed call stays what it was, whatever the engine leaves in its place', () => {
  expect(close(-1)).toBe(-1)
  // As a garbage collection does that waited for its helpers.
  koffi.errno(koffi.os.errno.EAGAIN as number)
  expect(errnoName(errno())).toBe('EBADF')

  expect(openat2(SYS_openat2, -1, 0, 0, 0, 0)).toBe(-1)
  koffi.errno(koffi.os.errno.EAGAIN as number)
  expect(errnoName(errno())).toBe('EINVAL')
})
