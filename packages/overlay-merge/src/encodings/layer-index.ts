import type { ByteString } from '@lsync/posix'
import type { Meta, Xattr } from '../model/entry.ts'
import { MARKS, type Namespace } from '../model/marks.ts'
import { components, type EntryPath, join, type Name, ROOT } from '../model/path.ts'
import { invalidMarker, parseWhName, WHITEOUT_PREFIX } from './aufs.ts'
import { LayerEntryRefusedError } from './errors.ts'
import { DEFAULT_DIRECTORY_META, type ItemOrder, isValidName, type LayerItem, type Loss, NAME_MAX } from './item.ts'
import { decodeKernelInode, plainEntry, type RawInode } from './kernel.ts'
import type { Spool } from './spool.ts'
import type { TarMember } from './tar-members.ts'

export interface LayerIndexOptions {
  /** `oci`: `.wh.` names, marks of overlayfs dropped. A namespace: the tar of a raw layer with marks of that one. */
  readonly form: 'oci' | Namespace | 'plain'
  /** Takes the data of files. */
  readonly spool: Spool
  /** What a directory is that the archive only implies: its metadata in the layers beneath. */
  readonly impliedMeta?: (path: EntryPath) => Meta | undefined
  readonly onLoss?: (loss: Loss) => void
}

interface Inode {
  readonly raw: RawInode
  /** Number of its data file in the spool. */
  readonly spool?: number
  readonly id: number
  /** How many names it has or had. */
  links: number
  /** No member described it: it was made for what is in it. */
  readonly implied?: true
}

interface Node {
  inode: Inode
  /** Directories only. */
  readonly children?: Map<Name, Node>
  /** Names that the layer hides below, whether or not it has them itself. */
  readonly whiteouts?: Set<Name>
  isOpaque: boolean
}

/**
 * An archive's members as the layer that they make up, in memory, with their data in a spool. Members
 * come in any order, replace each other, and are hostile: names only ever lead through this index, never through a
 * file system, so nothing that one member plants can catch another.
 * Source: overlay-format §10; OCI image layer specification, "Applying changesets".
 */
export class LayerIndex {
  readonly #options: LayerIndexOptions
  readonly #root: Node
  #next = 1

  constructor(options: LayerIndexOptions) {
    this.#options = options
    const meta = options.impliedMeta?.(ROOT) ?? DEFAULT_DIRECTORY_META
    this.#root = directoryNode({ raw: { kind: 'directory', meta }, id: 0, links: 1, implied: true })
  }

  /**
   * Takes one member in. Its body is read to the end if it is a file.
   * @throws {LayerEntryRefusedError}
   */
  async add(member: TarMember, body: AsyncIterable<Uint8Array>): Promise<void> {
    const path = memberPath(member.name, this.#options.form === 'oci')
    for (const what of member.losses) this.#options.onLoss?.({ path, what })
    if (path === ROOT) {
      if (member.type !== 'directory') throw new LayerEntryRefusedError(member.name, 'the layer root is a directory')
      this.#root.inode = this.#inodeOf(path, member)
      return
    }
    const names = components(path)
    const name = names.pop() as Name
    if (this.#options.form === 'oci') {
      const meaning = parseWhName(name)
      if (meaning.means === 'invalid') throw invalidMarker(path)
      if (meaning.means === 'whiteout' || meaning.means === 'opaque') {
        checkMarker(member, path)
        const parent = this.#parent(names, path)
        if (meaning.means === 'opaque') parent.isOpaque = true
        else parent.whiteouts.add(meaning.name as string as Name)
        return
      }
    }
    const parent = this.#parent(names, path)
    if (member.type === 'link') {
      this.#link(member, path, parent, name)
      return
    }
    this.#checkDevice(member, path)
    const inode = await this.#stored(path, member, body)
    const old = parent.children.get(name)
    if (inode.raw.kind !== 'directory') parent.children.set(name, { inode, isOpaque: false })
    else if (old?.children === undefined) parent.children.set(name, directoryNode(inode))
    else old.inode = inode
  }

  /** Everything that the archive made, a directory before its content. Data may be taken once. */
  *items(order: ItemOrder = 'path'): Generator<LayerItem, void, undefined> {
    const stack: { path: EntryPath; node: Node; names: readonly Name[]; next: number }[] = []
    const enter = (path: EntryPath, node: Node) =>
      stack.push({ path, node, names: this.#names(node, path, order), next: 0 })
    yield this.#itemOf(ROOT, this.#root)
    enter(ROOT, this.#root)
    for (let level = stack.at(-1); level !== undefined; level = stack.at(-1)) {
      const name = level.names[level.next++]
      if (name === undefined) {
        stack.pop()
        continue
      }
      const path = join(level.path, name as string as ByteString)
      const node = level.node.children?.get(name)
      const isHidden = level.node.whiteouts?.has(name) === true
      if (node === undefined) {
        yield { entry: { kind: 'whiteout', path, form: 'device' } }
        continue
      }
      yield this.#itemOf(path, node, isHidden)
      if (node.children !== undefined) enter(path, node)
    }
  }

  #names(node: Node, path: EntryPath, order: ItemOrder): readonly Name[] {
    const { children = new Map<Name, Node>(), whiteouts = new Set<Name>() } = node
    const hidden = [...whiteouts].filter((name) => !children.has(name)).sort()
    const visible: Name[] = []
    for (const [name, child] of children) {
      if (this.#options.form !== 'oci' || parseWhName(name).means !== 'bookkeeping') {
        const isWhiteout = child.children === undefined && isWhiteoutInode(child.inode.raw, this.#options.form)
        ;(isWhiteout && order === 'whiteouts-first' ? hidden : visible).push(name)
      } else this.#options.onLoss?.({ path: join(path, name as string as ByteString), what: 'bookkeeping of AUFS' })
    }
    if (order === 'whiteouts-first') return [...hidden.sort(), ...visible.sort()]
    return [...hidden, ...visible].sort()
  }

  #itemOf(path: EntryPath, node: Node, isHidden = false): LayerItem {
    const { form } = this.#options
    const { inode } = node
    const group = inode.links > 1 ? { linkGroup: String(inode.id) } : {}
    const raw: RawInode = inode.raw.kind === 'directory' ? inode.raw : { ...inode.raw, ...group }
    const item: LayerItem =
      form === 'trusted' || form === 'user'
        ? decodeKernelInode(path, raw, MARKS[form])
        : { entry: plainEntry(path, raw) }
    const { entry } = item
    if (entry.kind === 'directory') {
      if (inode.implied === true) {
        this.#options.onLoss?.({ path, what: 'attributes of the directory (the archive does not name it)' })
      }
      return { ...item, entry: { ...entry, opaque: path !== ROOT && (entry.opaque || node.isOpaque || isHidden) } }
    }
    if (entry.kind !== 'file' || inode.spool === undefined) return item
    const spooled = { ...item, spooled: inode.spool }
    return entry.metacopy === undefined ? { ...spooled, ...this.#options.spool.dataOf(inode.spool) } : spooled
  }

  /** The directory that holds a member, made where the archive only implies it. */
  #parent(names: readonly Name[], path: EntryPath): Required<Node> {
    let node = this.#root
    let at = ROOT
    for (const name of names) {
      at = join(at, name as string as ByteString)
      let child = node.children?.get(name)
      if (child === undefined) {
        const meta = this.#options.impliedMeta?.(at)
        const raw: RawInode = { kind: 'directory', meta: meta ?? DEFAULT_DIRECTORY_META }
        child = directoryNode({ raw, id: this.#next++, links: 1, ...(meta === undefined ? { implied: true } : {}) })
        node.children?.set(name, child)
      } else if (child.children === undefined) {
        const what = child.inode.raw.kind === 'symlink' ? 'a symlink' : 'not a directory'
        throw new LayerEntryRefusedError(path, `it would be written through ${at}, which is ${what} in the archive`)
      }
      node = child
    }
    return node as Required<Node>
  }

  #link(member: TarMember, path: EntryPath, parent: Required<Node>, name: Name): void {
    const target = this.#find(memberPath(member.linkName))
    if (target === undefined) {
      const hint = 'export it again together with the file that it links to'
      throw new LayerEntryRefusedError(
        path,
        `it links to ${member.linkName}, which is not in the archive before it`,
        hint,
      )
    }
    if (target.children !== undefined) throw new LayerEntryRefusedError(path, 'it is a hard link to a directory')
    if (parent.children.get(name) === target) return
    target.inode.links++
    parent.children.set(name, { inode: target.inode, isOpaque: false })
  }

  #find(path: EntryPath): Node | undefined {
    let node: Node | undefined = this.#root
    for (const name of components(path)) node = node?.children?.get(name)
    return node
  }

  #checkDevice(member: TarMember, path: EntryPath): void {
    const { form } = this.#options
    if (member.type !== 'character' || member.rdev !== 0 || form === 'trusted' || form === 'user') return
    const hint = 'if the archive is the tar of a raw upper directory, import it in the form `tar`'
    throw new LayerEntryRefusedError(path, 'it is a character device 0:0', hint)
  }

  async #stored(path: EntryPath, member: TarMember, body: AsyncIterable<Uint8Array>): Promise<Inode> {
    const inode = this.#inodeOf(path, member)
    if (inode.raw.kind !== 'file') return inode
    await this.#options.spool.put(inode.id, member, body)
    return { ...inode, spool: inode.id }
  }

  #inodeOf(path: EntryPath, member: TarMember): Inode {
    const { mode, uid, gid, atimeNs, mtimeNs } = member
    const meta: Meta = { mode, uid, gid, atimeNs, mtimeNs, xattrs: this.#xattrsOf(path, member) }
    return { raw: rawOf(path, member, meta), id: this.#next++, links: 1 }
  }

  #xattrsOf(path: EntryPath, { xattrs }: TarMember): readonly Xattr[] {
    if (this.#options.form !== 'oci') return xattrs
    return xattrs.filter(({ name }) => {
      if (!name.startsWith('trusted.overlay.') && !name.startsWith('user.overlay.')) return true
      this.#options.onLoss?.({ path, what: `attribute ${name} (a mark of overlayfs has no meaning in an OCI layer)` })
      return false
    })
  }
}

function directoryNode(inode: Inode): Node {
  return { inode, children: new Map(), whiteouts: new Set(), isOpaque: false }
}

function isWhiteoutInode(raw: RawInode, form: LayerIndexOptions['form']): boolean {
  if (form !== 'trusted' && form !== 'user') return false
  return decodeKernelInode(ROOT, raw, MARKS[form]).entry.kind === 'whiteout'
}

function checkMarker(member: TarMember, path: EntryPath): void {
  const isEmpty = member.sizeBytes === 0 && (member.type === 'file' || member.type === 'link')
  if (!isEmpty) throw new LayerEntryRefusedError(path, 'a whiteout marker is an empty file')
}

/**
 * Where a member belongs beneath the layer root. `./`, a leading `/` and doubled slashes mean nothing.
 * @throws {LayerEntryRefusedError} on `..`, on names too long, on none at all
 */
export function memberPath(name: ByteString, hasMarkers = false): EntryPath {
  const names = name.split('/').filter((part) => part !== '' && part !== '.')
  if (name === '') throw new LayerEntryRefusedError(name, 'a member without a name')
  for (const [index, part] of names.entries()) {
    // The marker of a long name is longer than a name can be, and is never one in a file system.
    const isMarker = hasMarkers && index === names.length - 1 && part.startsWith(WHITEOUT_PREFIX)
    if (isMarker && part.length <= NAME_MAX + WHITEOUT_PREFIX.length && !part.includes('\0')) continue
    if (part === '..') throw new LayerEntryRefusedError(name, 'its name leads out of the layer (..)')
    if (part.length > NAME_MAX) {
      throw new LayerEntryRefusedError(name.slice(0, 300), `a component of its name is longer than ${NAME_MAX} bytes`)
    }
    if (!isValidName(part)) throw new LayerEntryRefusedError(name, 'its name is not one that a file can have')
  }
  return names.join('/') as EntryPath
}

function rawOf(path: EntryPath, member: TarMember, meta: Meta): RawInode {
  switch (member.type) {
    case 'file':
      return { kind: 'file', meta, sizeBytes: member.sizeBytes }
    case 'directory':
      return { kind: 'directory', meta }
    case 'symlink': {
      const { linkName: target } = member
      if (target === '' || target.length > 4095) throw new LayerEntryRefusedError(path, 'its symlink target is none')
      return { kind: 'symlink', meta, target }
    }
    case 'character':
    case 'block':
      return { kind: 'special', meta, type: member.type, rdev: member.rdev }
    case 'fifo':
      return { kind: 'special', meta, type: 'fifo', rdev: 0 }
    case 'link':
      throw new Error('a hard link has no inode of its own')
  }
}
