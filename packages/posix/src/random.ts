import { errnoName, PosixError } from './errors.ts'
import { allocate, errno, libcFunction } from './native.ts'

const getrandomNative = libcFunction('getrandom', 'l', 'plu')

// Up to so many bytes getrandom(2) never gives fewer than asked for.
const WHOLE_BYTES = 256
const random = allocate(WHOLE_BYTES)

/**
 * Random bytes (at most 256) as hex digits, for names that nobody can guess. `node:crypto` has them too, but takes 5 ms
 * to load. Source: getrandom(2).
 */
export function randomHex(sizeBytes: number): string {
  if (sizeBytes > WHOLE_BYTES) throw new RangeError(`at most ${WHOLE_BYTES} bytes, not ${sizeBytes}`)
  while (getrandomNative(random.address, sizeBytes, 0) < 0) {
    const code = errnoName(errno())
    if (code !== 'EINTR') throw new PosixError(code, { syscall: 'getrandom', path: '' })
  }
  return random.buffer.toString('hex', 0, sizeBytes)
}
