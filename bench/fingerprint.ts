import { startCommand } from './command.ts'

/** Everything that two equal trees have in common, by path. The fields of a record are in `fingerprint.c`. */
export type Fingerprint = Map<string, string>

/** How a tree differs from another: entries in all, and how many for each reason. */
export type Difference = { entries: number; reasons: Record<string, number>; examples: string[] }

const fields = ['type', 'mode', 'uid', 'gid', 'size', 'mtime', 'rdev', 'content', 'xattrs', 'links'] as const

/** Reads the fingerprint of the tree at `directory`, hard-link groups included. */
export async function takeFingerprint(
  program: string,
  directory: string,
  options: { wholeSeconds: boolean },
): Promise<Fingerprint> {
  const records = (await startCommand([program, directory])).split('\0')
  records.pop()
  const entries = new Map<string, { facts: string; inode: string }>()
  /** First path of each inode that has several in this tree. */
  const groups = new Map<string, string[]>()
  for (const record of records) {
    const [path = '', facts = '', identity = ''] = record.split('\t')
    const [device = '', inode = '', links = ''] = identity.split(':')
    const key = facts.startsWith('d') || links === '1' ? '' : `${device}:${inode}`
    // The only dot among the facts is the one between seconds and nanoseconds.
    entries.set(path, { facts: options.wholeSeconds ? facts.replace(/\.\d+/, '') : facts, inode: key })
    if (key !== '') groups.set(key, [...(groups.get(key) ?? []), path])
  }
  const fingerprint: Fingerprint = new Map()
  for (const [path, { facts, inode }] of entries) {
    const group = groups.get(inode) ?? []
    fingerprint.set(path, `${facts} ${group.length > 1 ? [...group].sort()[0] : '-'}`)
  }
  return fingerprint
}

/** What is different in `actual` from `expected`. */
export function compareFingerprints(expected: Fingerprint, actual: Fingerprint): Difference {
  const difference: Difference = { entries: 0, reasons: {}, examples: [] }
  const note = (path: string, reasons: readonly string[]): void => {
    difference.entries++
    for (const reason of reasons) difference.reasons[reason] = (difference.reasons[reason] ?? 0) + 1
    if (difference.examples.length < 5) difference.examples.push(`${path} (${reasons.join(', ')})`)
  }
  for (const [path, record] of expected) {
    const other = actual.get(path)
    if (other === undefined) note(path, ['missing'])
    else if (other !== record) {
      const [left, right] = [record.split(' '), other.split(' ')]
      note(
        path,
        fields.filter((_, index) => left[index] !== right[index]),
      )
    }
  }
  for (const path of actual.keys()) if (!expected.has(path)) note(path, ['extra'])
  return difference
}
