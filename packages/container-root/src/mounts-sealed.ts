import { closeSync, openSync, rmSync, writeSync } from 'node:fs'
import { inflateRawSync } from 'node:zlib'
import { bytesOf, createOverlay, type HostPath, openRoot, PosixError, randomHex, textOf, withFd } from '@lsync/posix'
import { openSealed } from './sealed-layer.ts'

// An empty directory as `mkfs.erofs -T0 -U 00000000-0000-0000-0000-000000000000 --all-root` makes it, deflated.
const EMPTY_IMAGE =
  '7dGhDYBADIXhdweSASAkqNPdgV3YgXUPPAKBLuZCEBgEiv8z7UubVFQC8FfrcuR5GvZKUqOk8LATPrxfS9rGqL5kd/f7PJXaKl59pygz43kAAADASyc='

/**
 * Whether this node can mount a sealed layer that lies in `store` as a lower, found out by doing it; what is made there is gone
 * afterwards. `place` is any directory of the node.
 */
export function mountsSealed(store: HostPath, place: HostPath): boolean {
  const path = `${textOf(store)}/.lsync-try-${randomHex(8)}`
  try {
    const file = openSync(path, 'wx', 0o600)
    try {
      writeSync(file, inflateRawSync(Buffer.from(EMPTY_IMAGE, 'base64')))
    } finally {
      closeSync(file)
    }
    return withFd(openSealed(bytesOf(path) as HostPath), (image) =>
      withFd(openRoot(place), (other) => withFd(createOverlay({ lowers: [image, other], readOnly: true }), () => true)),
    )
  } catch (error) {
    if (!(error instanceof PosixError)) throw error
    return false
  } finally {
    rmSync(path, { force: true })
  }
}
