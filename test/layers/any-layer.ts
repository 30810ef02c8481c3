import fc from 'fast-check'
import { openNew, openRegular } from '../../packages/overlay-merge/src/encodings/inode.ts'
import type { LayerItem } from '../../packages/overlay-merge/src/encodings/item.ts'
import type { Entry, Meta, Redirect } from '../../packages/overlay-merge/src/model/entry.ts'
import { type EntryPath, join, ROOT } from '../../packages/overlay-merge/src/model/path.ts'
import { type ByteString, close, makeDevice, readAt, truncate, writeAt } from '../../packages/posix/src/index.ts'

/** What a form can hold; the rest is not generated. */
export interface Abilities {
  readonly whiteouts?: boolean
  readonly opaque?: boolean
  readonly redirects?: boolean
  readonly metacopies?: boolean
  readonly devices?: boolean
  readonly sockets?: boolean
  /** Any owner, any mode; without it those that an ordinary user can give and read. */
  readonly anyOwner?: boolean
  readonly trustedXattrs?: boolean
  /** Whiteouts of names up to 251 bytes only, which a `.wh.` file can stand for. */
  readonly shortWhiteouts?: boolean
  /** Names that begin with `.wh.`. */
  readonly whNames?: boolean
}

/** An item as plain data, with its content. */
export interface Model {
  readonly entry: Entry
  readonly content?: string
  /** A hole before the content. */
  readonly holeBytes?: number
}

interface Node {
  readonly make: (path: EntryPath) => Model
  readonly children?: Readonly<Record<string, Node>>
}

const NAMES = [
  'a',
  'b',
  'c d',
  '\xff\xfe',
  'x\ny',
  '\xc3\xa9\xe2\x82\xac',
  '\xed\xa0\x80',
  '\xf0\x9f\x98\x80\xff',
  'q\\"\t\x01\x7f',
  '-rf',
  '...',
  'n'.repeat(255),
  'm'.repeat(101),
  '__proto__',
]

/** The items of a whole layer, the root first, in the order `whiteouts-first`. */
export function anyLayer(abilities: Abilities): fc.Arbitrary<Model[]> {
  const links = fc.array(fc.tuple(fc.nat(30), fc.nat(30)), { maxLength: 3 })
  return fc.tuple(anyMeta(abilities, 'directory'), anyChildren(abilities, 3), links).map(([meta, children, pairs]) => {
    const models: Model[] = []
    flatten(ROOT, { make: (path) => ({ entry: { kind: 'directory', path, meta, opaque: false } }), children }, models)
    return withLinks(models, pairs)
  })
}

function flatten(path: EntryPath, node: Node, into: Model[]): void {
  const model = node.make(path)
  into.push(model)
  const children = Object.entries(node.children ?? {}).map(([name, child]) => {
    const childPath = join(path, name as ByteString)
    return { name, child, childPath, isWhiteout: child.make(childPath).entry.kind === 'whiteout' }
  })
  children.sort((left, right) => {
    if (left.isWhiteout !== right.isWhiteout) return left.isWhiteout ? -1 : 1
    return left.name < right.name ? -1 : 1
  })
  for (const { child, childPath } of children) flatten(childPath, child, into)
}

/** Makes some names further names of others. */
function withLinks(models: Model[], pairs: readonly (readonly [number, number])[]): Model[] {
  const linkable = models.flatMap((model, index) =>
    model.entry.kind === 'directory' || model.entry.kind === 'whiteout' ? [] : [index],
  )
  const linked = [...models]
  for (const [from, to] of pairs) {
    const [first, second] = [linkable[from % linkable.length], linkable[to % linkable.length]]
    if (first === undefined || second === undefined || first === second) continue
    const source = linked[first] as Model
    const { entry } = source
    if (entry.kind === 'directory' || entry.kind === 'whiteout') continue
    const target = linked[second] as Model
    if ((target.entry as { linkGroup?: string }).linkGroup !== undefined) continue
    const linkGroup = entry.linkGroup ?? `g${first}`
    linked[first] = { ...source, entry: { ...entry, linkGroup } }
    linked[second] = { ...source, entry: { ...entry, linkGroup, path: target.entry.path } }
  }
  return linked
}

function anyChildren(abilities: Abilities, depth: number): fc.Arbitrary<Record<string, Node>> {
  const names = abilities.whNames === true ? [...NAMES, '.wh.a', '.wh..wh..opq'] : NAMES
  const entries = fc.uniqueArray(fc.tuple(fc.constantFrom(...names), anyNode(abilities, depth)), {
    selector: ([name]) => name,
    maxLength: depth === 3 ? 5 : 3,
  })
  // Not an object literal: one of the names is __proto__.
  return entries.map((list) => {
    const children: Record<string, Node> = Object.create(null)
    for (const [name, node] of list) {
      const isWhiteout = node.make(name as EntryPath).entry.kind === 'whiteout'
      if (!(isWhiteout && abilities.shortWhiteouts === true && name.length > 251)) children[name] = node
    }
    return children
  })
}

function anyNode(abilities: Abilities, depth: number): fc.Arbitrary<Node> {
  const file = fc.tuple(anyMeta(abilities, 'file'), anyContent, fc.constantFrom(0, 0, 0, 200_000)).map(
    ([meta, content, holeBytes]): Node => ({
      make: (path) => ({
        entry: { kind: 'file', path, meta, sizeBytes: holeBytes + content.length },
        content,
        holeBytes,
      }),
    }),
  )
  const symlink = fc
    .tuple(anyMeta(abilities, 'symlink'), fc.constantFrom('a', '../..', '/etc', '\xff', 't'.repeat(300)))
    .map(
      ([meta, target]): Node => ({
        make: (path) => ({ entry: { kind: 'symlink', path, meta, target: target as ByteString } }),
      }),
    )
  const special = fc.tuple(anyMeta(abilities, 'special'), fc.constantFrom(...specials(abilities))).map(
    ([meta, [type, rdev]]): Node => ({
      make: (path) => ({ entry: { kind: 'special', path, meta, type, rdev } }),
    }),
  )
  const choices: fc.WeightedArbitrary<Node>[] = [
    { weight: 4, arbitrary: file },
    { weight: 1, arbitrary: symlink },
    { weight: 1, arbitrary: special },
  ]
  if (abilities.whiteouts === true) {
    const whiteout: Node = { make: (path) => ({ entry: { kind: 'whiteout', path, form: 'device' } }) }
    choices.push({ weight: 2, arbitrary: fc.constant(whiteout) })
  }
  if (abilities.metacopies === true) choices.push({ weight: 1, arbitrary: anyMetacopy(abilities) })
  if (depth > 0) choices.push({ weight: 4, arbitrary: anyDirectory(abilities, depth) })
  return fc.oneof(...choices)
}

type SpecialEntry = Extract<Entry, { kind: 'special' }>

function specials(abilities: Abilities): [SpecialEntry['type'], number][] {
  const types: [SpecialEntry['type'], number][] = [['fifo', 0]]
  if (abilities.sockets === true) types.push(['socket', 0])
  if (abilities.devices === true) {
    types.push(['character', makeDevice(1, 3)], ['block', makeDevice(259, 300)], ['block', makeDevice(0xfff, 0xf_ffff)])
  }
  return types
}

function anyDirectory(abilities: Abilities, depth: number): fc.Arbitrary<Node> {
  const opaque = abilities.opaque === true ? fc.boolean() : fc.constant(false)
  const redirect = abilities.redirects === true ? fc.option(anyRedirect, { nil: undefined }) : fc.constant(undefined)
  return fc.tuple(anyMeta(abilities, 'directory'), opaque, redirect, anyChildren(abilities, depth - 1)).map(
    ([meta, isOpaque, to, children]): Node => ({
      children,
      make: (path) => ({
        entry: { kind: 'directory', path, meta, opaque: isOpaque, ...(to === undefined ? {} : { redirect: to }) },
      }),
    }),
  )
}

const anyRedirect = fc.constantFrom('a', '/a/b', '/\xff/x\ny') as fc.Arbitrary<Redirect>

function anyMetacopy(abilities: Abilities): fc.Arbitrary<Node> {
  const digest = fc.option(fc.uint8Array({ minLength: 4, maxLength: 36 }), { nil: undefined })
  return fc
    .tuple(anyMeta(abilities, 'file'), fc.option(anyRedirect, { nil: undefined }), digest, fc.nat(1_000_000))
    .map(
      ([meta, redirect, bytes, sizeBytes]): Node => ({
        make: (path) => ({
          entry: {
            kind: 'file',
            path,
            meta,
            sizeBytes,
            metacopy: {
              ...(redirect === undefined ? {} : { redirect }),
              ...(bytes === undefined ? {} : { digest: bytes }),
            },
          },
        }),
      }),
    )
}

const anyContent = fc.oneof(
  fc.constantFrom('', 'x', '\0', '\xff\n'.repeat(300), 'b'.repeat(512), 'c'.repeat(20_000)),
  fc.uint8Array({ maxLength: 40 }).map((bytes) => Buffer.from(bytes).toString('latin1')),
)

const anyTime = fc.oneof(
  fc.bigInt({ min: 0n, max: 4_000_000_000_000_000_000n }),
  fc.constantFrom(0n, -1n, -1_500_000_000n, 1_000_000_000n, 2_147_483_648_000_000_000n, 9_999_999_999_999_999_999n),
)

function anyMeta(abilities: Abilities, kind: 'file' | 'directory' | 'symlink' | 'special'): fc.Arbitrary<Meta> {
  const mine = abilities.anyOwner !== true
  const uid = mine
    ? fc.constant((process.getuid as () => number)())
    : fc.constantFrom(0, 1000, 0o777_777, 0o1_000_000, 2_097_152, 0xffff_fffe)
  const gid = mine ? fc.constant((process.getgid as () => number)()) : uid
  const floor = kind === 'directory' ? 0o700 : 0o600
  const mode = kind === 'symlink' ? fc.constant(0o777) : fc.nat(0o7777).map((bits) => (mine ? bits | floor : bits))
  return fc.record({ mode, uid, gid, atimeNs: anyTime, mtimeNs: anyTime, xattrs: anyXattrs(abilities, kind) })
}

function anyXattrs(abilities: Abilities, kind: string): fc.Arbitrary<Meta['xattrs']> {
  const names: string[] = []
  if (kind === 'file' || kind === 'directory') names.push('user.a', 'user.\xff\n\xc3\xa9', 'user.=x=%41')
  if (abilities.trustedXattrs === true) names.push('trusted.b', 'security.c')
  if (names.length === 0) return fc.constant([])
  const value = fc.oneof(
    fc.uint8Array({ maxLength: 30 }),
    fc.constantFrom(Buffer.from([]), Buffer.from('9 a=b\n'), Buffer.from([0, 10, 255, 61, 0])),
  )
  return fc
    .uniqueArray(fc.tuple(fc.constantFrom(...names), value), { selector: ([name]) => name, maxLength: 3 })
    .map((list) =>
      list
        .map(([name, bytes]) => ({ name: name as ByteString, value: Buffer.from(bytes) }))
        .sort((left, right) => (left.name < right.name ? -1 : 1)),
    )
}

/** The models as items whose content lies in files beneath `dirfd`. */
export function itemsOf(models: readonly Model[], dirfd: number): LayerItem[] {
  return models.map((model, index) => {
    const { entry, content, holeBytes = 0 } = model
    if (content === undefined) return { entry }
    const name = `content${index}` as ByteString
    const fd = openNew(dirfd, name)
    truncate(fd, holeBytes + content.length)
    writeAt(fd, holeBytes, Buffer.from(content, 'latin1'))
    close(fd)
    return { entry, openContent: () => openRegular(dirfd, name) }
  })
}

/** Items as data that compares: content read, link groups numbered by their first names, those of one name dropped. */
export function observed(items: Iterable<LayerItem>): unknown[] {
  const list: { item: LayerItem; content: string | undefined }[] = []
  // At once, since content is only there until the next item.
  for (const item of items) list.push({ item, content: contentOf(item) })
  const groups = new Map<string, string[]>()
  for (const { item } of list) {
    const group = (item.entry as { linkGroup?: string }).linkGroup
    if (group !== undefined) groups.set(group, [...(groups.get(group) ?? []), item.entry.path])
  }
  return list.map(({ item, content }) => {
    const { linkGroup, ...entry } = item.entry as Entry & { linkGroup?: string }
    const names = linkGroup === undefined ? [] : (groups.get(linkGroup) as string[])
    return plain({ ...entry, links: names.length > 1 ? names[0] : undefined, content })
  })
}

function contentOf(item: LayerItem): string | undefined {
  if (item.openContent === undefined) return undefined
  const { fd, stat } = item.openContent()
  try {
    return readAt(fd, 0, stat.sizeBytes).toString('latin1')
  } finally {
    close(fd)
  }
}

/** Buffers and typed arrays as hex, absent fields left out, so that `toEqual` sees values only. */
function plain(value: unknown): unknown {
  if (value instanceof Uint8Array) return Buffer.from(value).toString('hex')
  if (Array.isArray(value)) return value.map(plain)
  if (typeof value !== 'object' || value === null) return value
  return Object.fromEntries(
    Object.entries(value).flatMap(([key, field]) => (field === undefined ? [] : [[key, plain(field)]])),
  )
}
