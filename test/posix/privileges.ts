import { existsSync } from 'node:fs'
import { seesTrustedXattrs } from '../../packages/posix/src/index.ts'
import { needs } from '../support/needs.ts'
import { isPresent } from '../support/system.ts'

/** Mounts and trusted attributes: CAP_SYS_ADMIN in the initial user namespace. */
export const mayMount = needs('CAP_SYS_ADMIN in the initial user namespace', seesTrustedXattrs())

/** FUSE, and bindfs as a file system made with it. */
export function hasBindfs(): boolean {
  return needs('bindfs and /dev/fuse', existsSync('/dev/fuse') && isPresent('bindfs'))
}
