import { type ByteString, statFd, tryStatAt } from '@lsync/posix'
import { join, ROOT } from '../model/path.ts'
import { LayerEntryRefusedError, NeedsDerefError, NotExpressibleError } from './errors.ts'
import type { LayerItem, Loss, ReadOptions } from './item.ts'
import { completed, plainEntry, readInode, readRootInode } from './kernel.ts'
import type { TreeForm } from './tree-sink.ts'
import { MountGuard, sortedNames, type TreeReader, walkTree } from './walk.ts'

/**
 * A tree without marks: every name is what it is, every attribute is the content's own.
 * @throws {LayerEntryRefusedError} on a character device 0:0, which no merged view contains and every layer takes for a
 * whiteout
 */
export function readPlainTree(rootFd: number, _options: ReadOptions = {}): Generator<LayerItem, void, undefined> {
  const guard = new MountGuard(rootFd)
  const reader: TreeReader = {
    root: (fd) => completed({ entry: plainEntry(ROOT, readRootInode(fd)) }, fd, '.' as ByteString, statFd(fd)),
    list: (fd) => sortedNames(fd),
    read(fd, path, name) {
      const stat = tryStatAt(fd, name)
      if (stat === undefined) return undefined
      const full = join(path, name)
      guard.check(full, stat)
      if (stat.isWhiteoutDevice) {
        const hint = 'read the tree as a kernel layer if it is one, or remove the node'
        throw new LayerEntryRefusedError(full, 'a plain tree holds no character device 0:0', hint)
      }
      return completed({ entry: plainEntry(full, readInode(fd, name, stat)) }, fd, name, stat)
    },
  }
  return walkTree(rootFd, reader)
}

/** How a plain tree is written: whiteouts, redirects and metacopies are refused, opaque marks reported. */
export function plainTreeForm(onLoss?: (loss: Loss) => void): TreeForm {
  const label = 'a plain tree'
  return {
    label,
    check(entry) {
      if (entry.kind === 'whiteout') throw whiteoutRefused(entry.path)
      if (entry.kind === 'directory' && entry.redirect !== undefined && !entry.opaque) {
        throw new NeedsDerefError(entry.path, label, 'redirect')
      }
      if (entry.kind === 'file' && entry.metacopy !== undefined)
        throw new NeedsDerefError(entry.path, label, 'metacopy')
      if (entry.kind === 'directory' && entry.opaque) onLoss?.({ path: entry.path, what: 'opaque mark' })
    },
    writeWhiteout(_dirfd, _name, path) {
      throw whiteoutRefused(path)
    },
  }
}

function whiteoutRefused(path: string): NotExpressibleError {
  const hint = 'merge the layer with what lies below it (`lsync merge --output`), or choose another form'
  return new NotExpressibleError(path, 'a plain tree', 'a whiteout', hint)
}
