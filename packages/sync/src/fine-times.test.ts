import { hostPath, O_CREAT, O_RDWR, openat, openRoot, rawStatFd, STATX_WORD, withFd, writeAt } from '@lsync/posix'
import { expect, it } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import { hasFineTimes } from './fine-times.ts'

it('is said of no kernel that has only the ticks of its clock', () => {
  const { fd } = temporary()
  expect(hasFineTimes(fd, '6.12.99-generic')).toBe(false)
  expect(hasFineTimes(fd, '5.15.0')).toBe(false)
  withFd(openRoot(hostPath('/proc')), (proc) => expect(hasFineTimes(proc, '7.0.0')).toBe(false))
})

it.each(['/tmp', '/dev/shm'])('where it is said, no change right after a look goes unseen: %s', (base) => {
  const { path, fd } = temporary(base)
  // Where it is not, looks are repeated.
  if (!hasFineTimes(fd)) return
  withFd(openat(fd, 'file' as never, O_RDWR | O_CREAT, 0o600), (file) => {
    const change = () => {
      const words = rawStatFd(file)
      return `${words[STATX_WORD.change]}.${words[STATX_WORD.change + 2]}`
    }
    for (let round = 0; round < 20_000; round++) {
      const before = change()
      writeAt(file, 0, Buffer.from('x'), path)
      expect(change()).not.toBe(before)
    }
  })
})
