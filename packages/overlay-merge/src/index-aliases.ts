import {
  type ByteString,
  close,
  DT_CHR,
  DT_DIR,
  errnoOf,
  type FileHandle,
  type HostPath,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_PATH,
  O_RDONLY,
  openat,
  openByHandle,
  openRoot,
  readDirents,
  type Stat,
  statAt,
  statFd,
  withFd,
} from '@lsync/posix'
import { type EntryPath, join, type Name } from './model/path.ts'
import { type Directory, lookup, OpenSources, rootDirectory, type Stack } from './resolve.ts'

/** A name that shows an index inode although no upper has it: under index=on, hard links of a lower file stay one file. */
export interface Alias {
  readonly directory: EntryPath
  readonly name: Name
  /** The name of the inode in the workdir's index directory. */
  readonly index: ByteString
  /** The layer of the lower file that the name would show without the index. */
  readonly layer: number
}

const HEADER_BYTES = 21
const MAGIC = 0xfb
const HANDLE_HEX = /^[0-9a-f]{44,}$/

/** Opens the index directory of a workdir; `undefined` when the upper was never mounted with index=on. */
export function openIndex(workdir: HostPath): number | undefined {
  return withFd(openRoot(workdir), (fd) => {
    try {
      return openat(fd, 'index' as ByteString, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return undefined
      throw error
    }
  })
}

/**
 * The names of the merged view that show an inode of the index, in path order. Reads directories of the view, no file.
 * Source: overlay-format "hard links and index"; the name of an entry is its lower inode's handle in hex, with the
 * kernel's header of 21 bytes before it.
 */
export function findAliases(stack: Stack, indexFd: number): Alias[] {
  const wanted = wantedInodes(stack, indexFd)
  if (wanted.size === 0) return []
  const aliases: Alias[] = []
  const pending: Directory[] = [rootDirectory(stack)]
  for (let directory = pending.pop(); directory !== undefined; directory = pending.pop()) {
    const opened = new OpenSources(stack)
    try {
      visit(stack, directory, opened, wanted, aliases, pending)
    } finally {
      opened.close()
    }
  }
  return aliases.sort((left, right) => (join(left.directory, left.name) < join(right.directory, right.name) ? -1 : 1))
}

function visit(
  stack: Stack,
  directory: Directory,
  opened: OpenSources,
  wanted: ReadonlyMap<string, ByteString>,
  aliases: Alias[],
  pending: Directory[],
): void {
  const names = new Set<Name>()
  for (const source of directory.sources) {
    readDirents(opened.fd(source), (name, type) => {
      if (type !== DT_CHR) names.add(name as string as Name)
    })
  }
  for (const name of names) {
    const found = lookup(stack, directory, name, (source, wantedName) => opened.inspect(source, wantedName))
    if (found.kind === 'directory') pending.push(found.directory)
    if (found.kind !== 'object' || found.source.layer === 0) continue
    const stat = found.top.stat as Stat
    if (stat.nlink < 2) continue
    const index = wanted.get(keyOf(found.source.layer, stat))
    if (index === undefined) continue
    aliases.push({ directory: directory.path, name, index, layer: found.source.layer })
  }
}

function keyOf(layer: number, stat: Stat): string {
  return `${layer}:${stat.ino}`
}

function wantedInodes(stack: Stack, indexFd: number): Map<string, ByteString> {
  const names: ByteString[] = []
  readDirents(indexFd, (name, type) => {
    // Directories stand for directories of the upper, and whiteouts for what was deleted (nfs_export).
    if (type !== DT_DIR && type !== DT_CHR && HANDLE_HEX.test(name)) names.push(name)
  })
  const wanted = new Map<string, ByteString>()
  for (const name of names) {
    if (statAt(indexFd, name).isWhiteoutDevice) continue
    const handle = handleOf(name)
    if (handle === undefined) continue
    for (let layer = 1; layer < stack.layers.length; layer++) {
      const stat = statByHandle((stack.layers[layer] as Stack['layers'][number]).fd, handle)
      if (stat !== undefined) wanted.set(keyOf(layer, stat), name)
    }
  }
  return wanted
}

function handleOf(name: ByteString): FileHandle | undefined {
  const bytes = Buffer.from(name, 'hex')
  // struct ovl_fb: version, magic, length, flags, handle type, 16 bytes of uuid, then the file system's own bytes.
  if (bytes[0] !== 0 || bytes[1] !== MAGIC || bytes[2] !== bytes.length) return undefined
  return { type: bytes[4] as number, bytes: bytes.subarray(HEADER_BYTES) }
}

function statByHandle(layerFd: number, handle: FileHandle): Stat | undefined {
  try {
    const fd = openByHandle(layerFd, handle, O_PATH)
    if (fd === undefined) return undefined
    try {
      return statFd(fd)
    } finally {
      close(fd)
    }
  } catch (error) {
    // A handle of another layer's file system means nothing here.
    if (['EINVAL', 'ENOTSUP', 'EOPNOTSUPP', 'ENOENT', 'EIO'].includes(errnoOf(error) ?? '')) return undefined
    throw error
  }
}
