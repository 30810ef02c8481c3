import { type ByteString, openRoot, withFd } from '@lsync/posix'
import { z } from 'zod'
import type { ContainerRoot } from './container-root.ts'
import { Hooks } from './hooks.ts'
import { readRecord, replaceRecord } from './record-file.ts'

/** `hooks.json` of a root on a node: how its container is stopped, started and looked at there. */
export const HooksRecord = z.strictObject({ format: z.literal(1), hooks: Hooks })
export type HooksRecord = z.infer<typeof HooksRecord>

const HOOKS_JSON = 'hooks.json' as ByteString

/** The hooks of a root on this node; none where none were set. */
export function readHooks(root: ContainerRoot): Hooks {
  const path = root.statePath
  return withFd(openRoot(path), (fd) => readRecord({ fd, path }, HOOKS_JSON, HooksRecord)?.hooks ?? {})
}

/** Replaces the hooks of a root on this node, durably. */
export function writeHooks(root: ContainerRoot, hooks: Hooks): void {
  const path = root.statePath
  withFd(openRoot(path), (fd) => replaceRecord({ fd, path }, HOOKS_JSON, HooksRecord.parse({ format: 1, hooks })))
}
