import { ResolvedTree, type ShownInode, type StackInit, stackFrom } from '@lsync/overlay-merge'
import { type ByteString, close, PosixError, statFd } from '@lsync/posix'
import type { Xattr } from '../model/tree.ts'
import type { EntryState, Source, SourceDirectory, SourceFile, SourceName } from './source.ts'

type Directory = ResolvedTree['root']
type OpenDirectory = ReturnType<ResolvedTree['open']>
type Name = Parameters<OpenDirectory['find']>[0]

const MOST_KNOWN = 4096
/** Minor numbers are below it: what is above tells layers apart. */
const LAYER_STEP = 2 ** 20

/** The view that a stack of layers shows, without a mount. A name for which the kernel answers an errno is that error. */
export class StackSource implements Source {
  readonly #tree: ResolvedTree
  /** Directories that were seen in the ones above them, so that few paths are walked from the root. */
  readonly #known = new Map<ByteString | '', Directory>()

  constructor(init: StackInit) {
    this.#tree = new ResolvedTree(stackFrom(init))
  }

  openDirectory(path: ByteString | ''): SourceDirectory {
    const directory = this.#find(path)
    const remember = (name: ByteString, child: Directory) => this.#remember(joined(path, name), child)
    return new StackDirectory(this.#tree, directory, remember)
  }

  #find(path: ByteString | ''): Directory {
    let known: ByteString | '' = path
    while (known !== '' && !this.#known.has(known)) known = known.slice(0, Math.max(0, known.lastIndexOf('/'))) as ''
    let directory = known === '' ? this.#tree.root : (this.#known.get(known) as Directory)
    const rest = path.slice(known.length).split('/')
    let at = known
    for (const name of rest.filter((part) => part !== '') as Name[]) {
      const opened = this.#tree.open(directory)
      try {
        const child = opened.find(name)?.child
        at = joined(at, name)
        if (child === undefined) throw new PosixError('ENOENT', { syscall: 'lookup', path: at })
        directory = child
      } finally {
        opened.close()
      }
    }
    return directory
  }

  #remember(path: ByteString, directory: Directory): void {
    if (this.#known.size >= MOST_KNOWN) this.#known.clear()
    this.#known.set(path, directory)
  }
}

class StackDirectory implements SourceDirectory {
  readonly #tree: ResolvedTree
  readonly #directory: Directory
  readonly #opened: OpenDirectory
  readonly #remember: (name: ByteString, child: Directory) => void
  /** What was found last: state, attributes and content of a name are asked for one after the other. */
  #last: { readonly name: ByteString; readonly inode: ShownInode; readonly layer: number } | undefined

  constructor(tree: ResolvedTree, directory: Directory, remember: (name: ByteString, child: Directory) => void) {
    this.#tree = tree
    this.#directory = directory
    this.#opened = tree.open(directory)
    this.#remember = remember
  }

  get state(): EntryState {
    return stateOf(this.#tree.shownDirectory(this.#directory), 0)
  }

  get ownXattrs(): readonly Xattr[] {
    return xattrsOf(this.#tree.shownDirectory(this.#directory))
  }

  entries(): SourceName[] {
    return this.#opened.names().map((name) => ({ name, isFile: false }))
  }

  stateOf(name: ByteString): EntryState | undefined {
    const found = this.#find(name)
    return found === undefined ? undefined : stateOf(found.inode, found.layer)
  }

  xattrs(name: ByteString): readonly Xattr[] {
    return xattrsOf(this.#known(name).inode)
  }

  readLink(name: ByteString): ByteString {
    return this.#known(name).inode.target
  }

  openFile(name: ByteString): SourceFile {
    const { inode, layer } = this.#known(name)
    const fd = inode.openData()
    return {
      fd,
      state: () => {
        const found = this.#find(name)
        if (found === undefined) throw new PosixError('ENOENT', { syscall: 'lookup', path: name })
        // The size is the data's: a metacopy tells it of itself, and the data could be another file's by now.
        return { ...stateOf(found.inode, layer), sizeBytes: statFd(fd).sizeBytes }
      },
      xattrs: () => xattrsOf(inode),
      close: () => close(fd),
    }
  }

  close(): void {
    this.#opened.close()
  }

  #find(name: ByteString) {
    const found = this.#opened.find(name as Name)
    if (found?.child !== undefined) this.#remember(name, found.child)
    this.#last = found === undefined ? undefined : { name, inode: found.inode, layer: layerOf(found.inode) }
    return this.#last
  }

  #known(name: ByteString) {
    const found = this.#last?.name === name ? this.#last : this.#find(name)
    if (found === undefined) throw new PosixError('ENOENT', { syscall: 'lookup', path: name })
    return found
  }
}

function stateOf({ stat }: ShownInode, layer: number): EntryState {
  const { mode, nlink, uid, gid, ino, sizeBytes, rdev, mtimeNs, ctimeNs } = stat
  // Two layers may share an inode (versions that are hard links of each other); a mount shows two files then.
  const dev = stat.dev + layer * LAYER_STEP
  return { mode, nlink, uid, gid, ino, sizeBytes, dev, rdev, mtimeNs, ctimeNs, isMountRoot: stat.isMountRoot }
}

/** The number of the layer that an inode is in: its link group begins with it. */
function layerOf({ group }: ShownInode): number {
  return Number.parseInt(group, 10) || 0
}

function xattrsOf({ xattrs }: ShownInode): readonly Xattr[] {
  return xattrs.map(({ name, value }) => [name, Buffer.from(value)])
}

function joined(path: ByteString | '', name: ByteString): ByteString {
  return (path === '' ? name : `${path}/${name}`) as ByteString
}
