import {
  type DirectoryName,
  FAN_CREATE,
  FAN_DELETE,
  FAN_MOVED_TO,
  FAN_RENAME,
  type FanotifyEvent,
  type FileHandle,
  handleKey,
} from '@lsync/posix'
import type { Hint } from './source.ts'

/** Where events go: who watches what, and how to reach them. */
export interface HintRouting<Root> {
  everybody(): readonly Root[]
  /** Those beneath whose root a directory lies. */
  ownersOf(directory: FileHandle): readonly Root[]
  /** Those whose root it is. */
  rootsAt(key: string): readonly Root[]
  /** A directory has another parent, or some unknown one has. */
  moved(directory: FileHandle | undefined): void
  /** The handle of a name now; asked only where the kernel did not tell. */
  handleOf(at: DirectoryName): FileHandle | undefined
  say(to: Root, hint: Hint): void
}

/**
 * Turns one event into the hints of those whom it concerns.
 *
 * A directory that appears gets a `tree` hint besides that of its name: what the kernel prepared elsewhere and renamed in
 * (overlayfs does, in its work directory) has had its events there. A move within a root needs none, since all that
 * happened in the directory was reported.
 */
export function hintEvent<Root>(event: FanotifyEvent, routing: HintRouting<Root>): void {
  if (event.overflow) {
    routing.moved(undefined)
    for (const root of routing.everybody()) routing.say(root, { kind: 'lost', reason: OVERFLOW })
    return
  }
  if (event.isDirectory && event.target !== undefined && (event.mask & FAN_DELETE) !== 0) {
    // Its removal shows in its parent alone, which lies outside.
    for (const root of routing.rootsAt(handleKey(event.target))) {
      routing.say(root, { kind: 'lost', reason: ROOT_REMOVED })
    }
  }
  if ((event.mask & FAN_RENAME) !== 0) hintMove(event, routing)
  else if (event.at !== undefined) hintName(event, event.at, routing)
}

export const OVERFLOW = 'the queue of events overflowed'
export const ROOT_REMOVED = 'the root itself was removed'

function hintName<Root>(event: FanotifyEvent, at: DirectoryName, routing: HintRouting<Root>): void {
  const appears = event.isDirectory && (event.mask & (FAN_CREATE | FAN_MOVED_TO)) !== 0 && at.name !== '.'
  if (appears && (event.mask & FAN_MOVED_TO) !== 0) routing.moved(event.target)
  const owners = routing.ownersOf(at.directory)
  if (owners.length === 0) return
  const object = event.isDirectory || at.name === '.' ? undefined : event.target
  const place = { kind: 'name', directory: { handle: at.directory }, name: at.name } as const
  const hint: Hint = object === undefined ? place : { ...place, object }
  const tree = appears ? treeOf(event, at, routing) : undefined
  for (const root of owners) {
    routing.say(root, hint)
    if (tree !== undefined) routing.say(root, tree)
  }
}

function hintMove<Root>(event: FanotifyEvent, routing: HintRouting<Root>): void {
  const { from, to } = event
  if (event.isDirectory && (from === undefined || to === undefined || !sameDirectory(from, to))) {
    routing.moved(event.target)
  }
  const leaves = from === undefined ? [] : routing.ownersOf(from.directory)
  const enters = to === undefined ? [] : routing.ownersOf(to.directory)
  const [fromEnd, toEnd] = [endOf(from), endOf(to)]
  for (const root of leaves) {
    const stays = enters.includes(root)
    routing.say(root, {
      kind: 'move',
      ...(fromEnd === undefined ? {} : { from: fromEnd }),
      ...(stays && toEnd !== undefined ? { to: toEnd } : {}),
    })
  }
  if (to === undefined || toEnd === undefined) return
  let tree: Hint | undefined
  for (const root of enters) {
    if (leaves.includes(root)) continue
    routing.say(root, { kind: 'move', to: toEnd })
    if (event.isDirectory) tree ??= treeOf(event, to, routing)
    if (tree !== undefined) routing.say(root, tree)
  }
}

function treeOf<Root>(event: FanotifyEvent, at: DirectoryName, routing: HintRouting<Root>): Hint | undefined {
  const handle = event.target ?? routing.handleOf(at)
  return handle === undefined ? undefined : { kind: 'tree', directory: { handle } }
}

function endOf(at: DirectoryName | undefined) {
  return at === undefined ? undefined : { directory: { handle: at.directory }, name: at.name }
}

function sameDirectory(from: DirectoryName, to: DirectoryName): boolean {
  return handleKey(from.directory) === handleKey(to.directory)
}
