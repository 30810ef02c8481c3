import { onTestFinished } from 'vitest'
import {
  close,
  hostPath,
  O_PATH,
  O_RDONLY,
  openByHandle,
  openRoot,
  pathOfFd,
  textOf,
  withFd,
} from '../../packages/posix/src/index.ts'
import type { DirectoryRef, Hint, Source, SourceRequest } from '../../packages/sync/src/source/source.ts'

/** A source that watches a root, and what it has said. */
export interface Watching {
  readonly source: Source
  readonly hints: Hint[]
  /** What was said of all that happened until now, since the last call; paths relative to the root, by the present tree. */
  said(): Promise<string[]>
  /** Stops the source and closes the root. */
  stop(): Promise<void>
}

/** Starts a source on a root; both are closed when the test ends. */
export async function watching(
  root: string,
  make: (request: SourceRequest) => Source,
  more: Partial<SourceRequest> = {},
): Promise<Watching> {
  const rootFd = openRoot(hostPath(root), O_RDONLY)
  const source = make({ root: hostPath(root), rootFd, choice: 'auto', pollIntervalMs: 3_600_000, ...more })
  const hints: Hint[] = []
  let open = true
  const stop = async () => {
    if (!open) return
    open = false
    await source.stop()
    close(rootFd)
  }
  onTestFinished(stop)
  try {
    await source.start((hint) => hints.push(hint))
  } catch (error) {
    await stop()
    throw error
  }
  return {
    source,
    hints,
    stop,
    async said() {
      await source.drain()
      return hints.splice(0).map((hint) => describe(hint, rootFd, root))
    },
  }
}

function describe(hint: Hint, rootFd: number, root: string): string {
  const place = (directory: DirectoryRef, name?: string): string => {
    const where = pathOf(directory, rootFd, root)
    return textOf(name === undefined ? where || '.' : where === '' ? name : `${where}/${name}`)
  }
  switch (hint.kind) {
    case 'name':
      return place(hint.directory, hint.name)
    case 'move':
      return `${hint.from === undefined ? '' : place(hint.from.directory, hint.from.name)} -> ${hint.to === undefined ? '' : place(hint.to.directory, hint.to.name)}`
    case 'tree':
      return `tree ${place(hint.directory)}`
    case 'lost':
      return `lost: ${hint.reason}`
  }
}

function pathOf(directory: DirectoryRef, rootFd: number, root: string): string {
  if ('path' in directory) return directory.path
  const fd = openByHandle(rootFd, directory.handle, O_PATH)
  if (fd === undefined) return '<gone>'
  return withFd(fd, () => {
    const path = pathOfFd(fd) as string
    return path === root ? '' : path.startsWith(`${root}/`) ? path.slice(root.length + 1) : path
  })
}
