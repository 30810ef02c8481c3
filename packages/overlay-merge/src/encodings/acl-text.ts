/** Tags of an ACL entry in the kernel's form. Source: linux/posix_acl_xattr.h. */
const TAGS = { user: [0x01, 0x02], group: [0x04, 0x08], mask: [0x10, 0x10], other: [0x20, 0x20] } as const
const NO_ID = 0xffff_ffff

/**
 * The kernel's form (`system.posix_acl_*`) of an ACL in text, as archives have it: `user::rw-,user:1000:r--,…`, also
 * one entry a line, also with the number as a fourth field. Empty for an ACL that says no more than the mode, and
 * `undefined` where a user or group has only a name.
 * Source: acl(5), "long text form"; star's pax extensions.
 */
export function aclFromText(text: string, kind: 'access' | 'default'): Uint8Array | undefined {
  const entries: { tag: number; permissions: number; id: number }[] = []
  for (const part of text.split(/[,\n]/)) {
    const entry = part.replace(/#.*$/, '').trim()
    if (entry === '') continue
    const [tagName, qualifier = '', bits = '', number] = entry.split(':')
    const tags = TAGS[tagName as keyof typeof TAGS]
    if (tags === undefined || !/^[rwx-]{3}/.test(bits)) return undefined
    const isNamed = qualifier !== ''
    const digits = number !== undefined && /^[0-9]+$/.test(number) ? number : qualifier
    if (isNamed && !/^[0-9]+$/.test(digits)) return undefined
    const permissions = (bits[0] === 'r' ? 4 : 0) | (bits[1] === 'w' ? 2 : 0) | (bits[2] === 'x' ? 1 : 0)
    entries.push({ tag: tags[isNamed ? 1 : 0], permissions, id: isNamed ? Number(digits) : NO_ID })
  }
  if (entries.length === 0 || (kind === 'access' && entries.length <= 3)) return new Uint8Array(0)
  entries.sort((left, right) => left.tag - right.tag || left.id - right.id)
  const bytes = Buffer.alloc(4 + entries.length * 8)
  bytes.writeUInt32LE(2, 0)
  entries.forEach(({ tag, permissions, id }, i) => {
    bytes.writeUInt16LE(tag, 4 + i * 8)
    bytes.writeUInt16LE(permissions, 6 + i * 8)
    bytes.writeUInt32LE(id, 8 + i * 8)
  })
  return bytes
}

const NAMES = new Map<number, string>(
  Object.entries(TAGS).flatMap(([name, tags]) => tags.map((tag) => [tag, name] as const)),
)

/**
 * The text of an ACL in the kernel's form, with numbers for users and groups, entries separated by commas; `undefined`
 * for what is no ACL of version 2.
 */
export function aclToText(bytes: Uint8Array): string | undefined {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (buffer.length < 4 || buffer.length % 8 !== 4 || buffer.readUInt32LE(0) !== 2) return undefined
  const parts: string[] = []
  for (let at = 4; at < buffer.length; at += 8) {
    const tag = buffer.readUInt16LE(at)
    const allowed = buffer.readUInt16LE(at + 2)
    const id = buffer.readUInt32LE(at + 4)
    const name = NAMES.get(tag)
    if (name === undefined) return undefined
    const bits = `${allowed & 4 ? 'r' : '-'}${allowed & 2 ? 'w' : '-'}${allowed & 1 ? 'x' : '-'}`
    parts.push(`${name}:${tag === 0x02 || tag === 0x08 ? id : ''}:${bits}`)
  }
  return parts.join(',')
}
