import type { ByteString } from '@lsync/posix'

/** A name that may have changed since the parent snapshot: made, removed, written to, or given other attributes. */
export interface SourceChange {
  /** Beneath the target, components joined by `/`; `''` is the target itself. */
  readonly path: ByteString | ''
  /**
   * `entry`: the name itself; of a directory, its attributes, and of what is in it only what is listed. `tree`: everything beneath
   * it as well, as after a rename.
   */
  readonly scope: 'entry' | 'tree'
}

/** Changes as a tree of names. */
export interface ChangeNode {
  readonly children: Map<ByteString, ChangeNode>
  isWhole: boolean
}

/** Puts a list of changes into a tree; the order does not matter, nor does it that one is listed twice. */
export function changeTreeOf(changes: Iterable<SourceChange>): ChangeNode {
  const root: ChangeNode = { children: new Map(), isWhole: false }
  for (const { path, scope } of changes) {
    let node = root
    for (const name of path.split('/') as ByteString[]) {
      if (name === '') continue
      let child = node.children.get(name)
      if (child === undefined) {
        child = { children: new Map(), isWhole: false }
        node.children.set(name, child)
      }
      node = child
    }
    if (scope === 'tree') node.isWhole = true
  }
  return root
}
