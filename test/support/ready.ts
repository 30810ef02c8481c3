import { mkdtempSync, rmdirSync } from 'node:fs'
import { needs } from './needs.ts'
import { isPresent, mount, unmount } from './system.ts'

let canMount: boolean | undefined

/** Tries it: the one privilege without which nothing in test/kernel can run. */
function mayMount(): boolean {
  const directory = mkdtempSync('/tmp/lsync-mount-')
  try {
    mount('tmpfs', directory, 'tmpfs', 0, 'size=64k')
    return unmount(directory)
  } catch {
    return false
  } finally {
    rmdirSync(directory)
  }
}

/** Whether file systems can be made and mounted here. Call it while tests are collected: what is missing is reported. */
export function canMountImages(): boolean {
  canMount ??= mayMount()
  const tools = ['losetup', 'mkfs.ext4', 'mkfs.xfs', 'mkfs.btrfs', 'setfattr', 'setfacl', 'setcap', 'chattr']
  const missing = tools.filter((tool) => !isPresent(tool))
  const hasRight = needs('the right to mount (root in the initial user namespace)', canMount)
  return needs(missing.length === 0 ? 'file-system tools' : missing.join(', '), missing.length === 0) && hasRight
}
