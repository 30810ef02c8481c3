import type { LayerItem } from '../../packages/overlay-merge/src/encodings/item.ts'
import { close, printable, readAt } from '../../packages/posix/src/index.ts'

/** An entry in a few words: `content`, `dir opaque 700`, `-> target`, `whiteout`, with attributes and `= first name`. */
export type Spec = string

/** A layer as a small literal, the root left out. Modes of directories are told where they are not 0755. */
export function outlineOf(items: Iterable<LayerItem>): Record<string, Spec> {
  const outline: Record<string, Spec> = {}
  const first = new Map<string, string>()
  for (const item of items) {
    const { entry } = item
    if (entry.path === '') continue
    const words = [wordOf(item)]
    if (entry.kind === 'directory') {
      if (entry.opaque) words.push('opaque')
      if (entry.redirect !== undefined) words.push(`redirect=${printable(entry.redirect)}`)
    }
    if (entry.kind !== 'whiteout') {
      const { mode, xattrs } = entry.meta
      if (entry.kind === 'directory' && mode !== 0o755) words.push(mode.toString(8))
      for (const { name, value } of xattrs) words.push(`${printable(name)}=${Buffer.from(value).toString('latin1')}`)
    }
    const group = entry.kind === 'directory' || entry.kind === 'whiteout' ? undefined : entry.linkGroup
    if (group !== undefined && first.has(group)) words.push(`= ${first.get(group)}`)
    else if (group !== undefined) first.set(group, entry.path)
    outline[printable(entry.path)] = words.join(' ')
  }
  return outline
}

function wordOf(item: LayerItem): string {
  const { entry } = item
  switch (entry.kind) {
    case 'directory':
      return 'dir'
    case 'whiteout':
      return 'whiteout'
    case 'symlink':
      return `-> ${printable(entry.target)}`
    case 'special':
      return entry.type
    case 'file':
      if (entry.metacopy !== undefined) return 'metacopy'
      return item.openContent === undefined ? '' : contentOf(item.openContent())
  }
}

function contentOf({ fd, stat }: { fd: number; stat: { sizeBytes: number } }): string {
  try {
    return stat.sizeBytes > 100 ? `${stat.sizeBytes} bytes` : readAt(fd, 0, 100).toString('latin1')
  } finally {
    close(fd)
  }
}
