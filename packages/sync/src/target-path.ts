import { type ByteString, LsyncError, printable } from '@lsync/posix'
import type { TreePath } from './model/operation.ts'

/** A path or a number of an operation is one that no honest sender makes. Nothing was done. */
export class OperationRefusedError extends LsyncError {
  constructor(path: string, why: string) {
    super('OPERATION_REFUSED', `${printable(path)}: ${why}`, {
      path,
      hint: 'run the same version of lsync on both ends; if they are, do not trust the sender',
    })
  }
}

/** What the directory inside a target is called that holds lsync's own state, where it cannot lie beside the target. */
export const STATE_INSIDE = /^\.lsync-[0-9a-f]{32}$/

const NAME_MAX = 255
const NAME_MAX_DEPTH = 4096

/** A checked path that names something beneath the root. */
export interface Place {
  readonly parent: TreePath
  readonly name: ByteString
}

/**
 * Takes a path apart: the directory and the name in it. Nothing that leaves the root or reaches the target's own state
 * passes.
 * @throws {OperationRefusedError} for the root itself, and for what is no path of a tree
 */
export function placeOf(path: TreePath): Place {
  const slash = path.lastIndexOf('/')
  const parent = (slash < 0 ? '' : path.slice(0, slash)) as TreePath
  // Most names come after another one of their directory, whose path needs no second look.
  if (slash > 0 && parent === checkedParent) checkName(path, slash + 1, path.length)
  else {
    checkPath(path)
    checkedParent = parent
  }
  return { parent, name: path.slice(slash + 1) as ByteString }
}

let checkedParent: TreePath | undefined

/** @throws {OperationRefusedError} for what is no path of a tree */
export function checkPath(path: TreePath): void {
  let depth = 0
  for (let start = 0; start <= path.length; depth++) {
    const slash = path.indexOf('/', start)
    const end = slash < 0 ? path.length : slash
    checkName(path, start, end)
    start = end + 1
  }
  if (depth > NAME_MAX_DEPTH) throw new OperationRefusedError(path, 'it is nested too deeply')
}

function checkName(path: TreePath, start: number, end: number): void {
  const length = end - start
  if (length === 0) throw new OperationRefusedError(path, 'a name is not empty')
  if (length > NAME_MAX) throw new OperationRefusedError(path, 'a name is at most 255 bytes long')
  if (path.charCodeAt(start) === 0x2e && (length === 1 || (length === 2 && path.charCodeAt(start + 1) === 0x2e))) {
    throw new OperationRefusedError(path, 'neither . nor .. is a name')
  }
  for (let at = start; at < end; at++) {
    if (path.charCodeAt(at) === 0) throw new OperationRefusedError(path, 'a path holds no NUL')
  }
  if (start === 0 && length === 39 && STATE_INSIDE.test(path.slice(0, end))) {
    throw new OperationRefusedError(path, 'this name is kept for the state of a target')
  }
}
