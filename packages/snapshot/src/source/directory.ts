import {
  type ByteString,
  close,
  DT_REG,
  errnoOf,
  getXattr,
  listXattrs,
  O_DIRECTORY,
  O_NOATIME,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  openat,
  openBeneath,
  readDirents,
  readSymlink,
  type Stat,
  statFd,
  tryStatAt,
} from '@lsync/posix'
import type { Xattr } from '../model/tree.ts'
import type { EntryState, Source, SourceDirectory, SourceFile, SourceName } from './source.ts'

/** A tree as it lies on disk: a directory, or a layer with its marks. Other file systems in it are left out. */
export class DirectorySource implements Source {
  readonly #fd: number

  constructor(fd: number) {
    this.#fd = fd
  }

  openDirectory(path: ByteString | ''): SourceDirectory {
    return new PlainDirectory(openBeneath(this.#fd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW))
  }
}

class PlainDirectory implements SourceDirectory {
  readonly #fd: number
  readonly state: Stat

  constructor(fd: number) {
    this.#fd = fd
    this.state = statFd(fd)
  }

  get ownXattrs(): readonly Xattr[] {
    return readXattrs(this.#fd, '')
  }

  entries(): SourceName[] {
    const entries: SourceName[] = []
    readDirents(this.#fd, (name, type) => entries.push({ name, isFile: type === DT_REG }))
    return entries
  }

  stateOf(name: ByteString): EntryState | undefined {
    return tryStatAt(this.#fd, name)
  }

  xattrs(name: ByteString): readonly Xattr[] {
    return readXattrs(this.#fd, name)
  }

  readLink(name: ByteString): ByteString {
    return readSymlink(this.#fd, name)
  }

  openFile(name: ByteString): SourceFile {
    const fd = this.#open(name)
    return { fd, state: () => statFd(fd), xattrs: () => readXattrs(fd, ''), close: () => close(fd) }
  }

  close(): void {
    close(this.#fd)
  }

  #open(name: ByteString): number {
    const flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK
    try {
      return openat(this.#fd, name, flags | O_NOATIME)
    } catch (error) {
      // Only the owner may leave the access time alone.
      if (errnoOf(error) !== 'EPERM') throw error
      return openat(this.#fd, name, flags)
    }
  }
}

/** All attributes of `name` beneath `fd` (`''`: of the fd itself), in the order in which restic stores them: as listed. */
export function readXattrs(fd: number, name: ByteString | ''): readonly Xattr[] {
  const names = listXattrs(fd, name)
  if (names.length === 0) return []
  return names.flatMap((attribute): Xattr[] => {
    const value = getXattr(fd, name, attribute)
    // Removed meanwhile.
    return value === undefined ? [] : [[attribute, value]]
  })
}
