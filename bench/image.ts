import { mkdirSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { runCommand, startCommand } from './command.ts'
import { mount, type Scratch } from './scratch.ts'

/** File systems that the harness makes of its own in memory. */
export type ImageFs = 'ext4' | 'xfs' | 'btrfs'

/** One file-system image, not mounted: a sparse file beneath the scratch folder. */
export type Image = { fs: ImageFs; path: string }

/** Tools that make an image of each kind. */
export const makers: Record<ImageFs, string> = { ext4: 'mkfs.ext4', xfs: 'mkfs.xfs', btrfs: 'mkfs.btrfs' }

/**
 * Makes an empty file system in a sparse file with room for `sizeBytes` and, on ext4, `inodes`. It only takes the
 * memory that is written to it.
 */
export function makeImage(
  scratch: Scratch,
  request: { fs: ImageFs; name: string; sizeBytes: number; inodes: number },
): Image {
  const path = join(scratch.path, `${request.name}.img`)
  writeFileSync(path, '')
  // xfs takes 512 bytes for an inode, and gives all of them no more than a quarter of a device.
  const inodeBytes = request.fs === 'xfs' ? request.inodes * 512 * 5 : 0
  // xfs refuses less than 300 MB, and btrfs keeps much of a small device to itself.
  const sizeBytes = Math.max(request.sizeBytes + inodeBytes, 1 << 30)
  truncateSync(path, Math.ceil(sizeBytes / (1 << 20)) * (1 << 20))
  const commands: Record<ImageFs, string[]> = {
    // Nothing is written in the background later: `noinit_itable` at the mount leaves the inode tables alone.
    ext4: [
      'mkfs.ext4',
      '-q',
      '-F',
      '-J',
      'size=64',
      '-N',
      String(request.inodes),
      '-E',
      'nodiscard,lazy_itable_init=1',
    ],
    xfs: ['mkfs.xfs', '-q', '-f', '-K'],
    btrfs: ['mkfs.btrfs', '-q', '-f', '-K'],
  }
  runCommand([...commands[request.fs], path])
  return { fs: request.fs, path }
}

/** Mounts an image at a new folder of the scratch folder. Returns that folder, and a function that unmounts it. */
export function mountImage(scratch: Scratch, image: Image, name: string): { root: string; unmount: () => void } {
  const root = scratch.folder(name)
  const options = image.fs === 'ext4' ? 'loop,noinit_itable' : 'loop'
  return { root, unmount: mount(scratch, ['-t', image.fs, '-o', options, image.path], root) }
}

/** Copies an unmounted image with its holes: a second file system in the very same state. */
export async function copyImage(scratch: Scratch, image: Image, name: string): Promise<Image> {
  const path = join(scratch.path, `${name}.img`)
  await startCommand(['cp', '--sparse=auto', image.path, path])
  return { fs: image.fs, path }
}

/** Removes an unmounted image. */
export function removeImage(image: Image): void {
  rmSync(image.path, { force: true })
}

/** Memory that an image takes. */
export function occupiedBytes(image: Image): number {
  return statSync(image.path).blocks * 512
}

/** Makes a folder, or on btrfs a subvolume, which is what btrfs can clone at once. */
export function makeRoot(path: string, fs: string): void {
  if (fs === 'btrfs') runCommand(['btrfs', '-q', 'subvolume', 'create', path])
  else mkdirSync(path)
}
