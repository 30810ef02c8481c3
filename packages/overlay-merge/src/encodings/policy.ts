import { LayerEntryRefusedError } from './errors.ts'
import { CAPABILITY } from './inode.ts'
import type { LayerItem, Loss } from './item.ts'

/** What is let in from a layer that somebody else made. */
export interface EntryPolicy {
  /** Block and character devices. Default `keep`. */
  readonly devices?: 'keep' | 'skip' | 'refuse'
  /** Setuid and setgid files, and file capabilities. Default `keep`. */
  readonly setuid?: 'keep' | 'clear' | 'refuse'
}

/**
 * The item as the policy lets it in; `undefined` when it is left out.
 * @throws {LayerEntryRefusedError}
 */
export function applyPolicy(
  item: LayerItem,
  policy: EntryPolicy,
  onLoss?: (loss: Loss) => void,
): LayerItem | undefined {
  const { entry } = item
  const { devices = 'keep', setuid = 'keep' } = policy
  if (entry.kind === 'special' && (entry.type === 'character' || entry.type === 'block') && devices !== 'keep') {
    if (devices === 'refuse') {
      throw new LayerEntryRefusedError(entry.path, 'it is a device node', 'allow devices if you trust the layer')
    }
    onLoss?.({ path: entry.path, what: 'a device node' })
    return undefined
  }
  if (entry.kind !== 'file' || setuid === 'keep') return item
  const hasCapability = entry.meta.xattrs.some(({ name }) => name === CAPABILITY)
  const isSetuid = (entry.meta.mode & 0o6000) !== 0
  if (!hasCapability && !isSetuid) return item
  if (setuid === 'refuse') {
    const reason = isSetuid ? 'it is setuid or setgid' : 'it has file capabilities'
    throw new LayerEntryRefusedError(entry.path, reason, 'allow setuid if you trust the layer')
  }
  onLoss?.({ path: entry.path, what: 'setuid, setgid or file capabilities' })
  const xattrs = entry.meta.xattrs.filter(({ name }) => name !== CAPABILITY)
  return { ...item, entry: { ...entry, meta: { ...entry.meta, xattrs, mode: entry.meta.mode & 0o1777 } } }
}
