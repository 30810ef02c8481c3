import { statAt, textOf, withFd } from '@lsync/posix'
import { type EntryPath, join, split } from './model/path.ts'
import type { StageRecord } from './model/plan.ts'
import { addTo } from './multimap.ts'
import type { Graft } from './plan.ts'
import { type Directory, layerAt, lookup, type OpenSources, resolve, rootDirectory, type Stack } from './resolve.ts'
import { openLayerDirectory } from './scan.ts'

/**
 * How each place of the result that takes its content from elsewhere in the base gets it: moved where nothing else
 * shows that content, copied where something does (hand-made redirects to one target, hard links made of metacopies).
 * In the order in which it must happen: copies while all is untouched, then moves, the deepest first, since one source
 * may lie within another.
 */
export function planStages(
  stack: Stack,
  grafts: readonly Graft[],
  rename: boolean,
  opened: OpenSources,
): StageRecord[] {
  const consumers = new Consumers(stack, grafts, opened)
  const ordered = [...grafts].sort((left, right) => (left.to < right.to ? -1 : 1))
  const stages = ordered.map((graft, id) => stageOf(graft, id, consumers, rename))
  return stages.sort(
    (left, right) => rank(left) - rank(right) || depth(right.from) - depth(left.from) || left.id - right.id,
  )
}

function stageOf(graft: Graft, id: number, consumers: Consumers, rename: boolean): StageRecord {
  const how = graft.kind === 'directory' ? consumers.howDirectory(graft) : consumers.howFile(graft, rename)
  return {
    type: 'stage',
    id,
    from: textOf(graft.from),
    to: textOf(graft.to),
    kind: graft.kind,
    ...(graft.upper === undefined ? {} : { upper: textOf(graft.upper) }),
    ...(graft.inIndex === true ? { inIndex: true as const } : {}),
    how,
  }
}

const RANK = { copy: 0, fill: 1, stay: 2, move: 3 } as const

function rank(stage: StageRecord): number {
  return RANK[stage.how]
}

function depth(path: string): number {
  return path.split('/').length
}

/** Which directories and files of the result show a given one of the base. */
class Consumers {
  readonly #stack: Stack
  readonly #base: number
  readonly #opened: OpenSources
  readonly #grafts = new Map<EntryPath, Graft[]>()
  readonly #directories = new Map<EntryPath, readonly Directory[]>()

  constructor(stack: Stack, grafts: readonly Graft[], opened: OpenSources) {
    this.#stack = stack
    this.#base = stack.layers.length - 1
    this.#opened = opened
    for (const graft of grafts) addTo(this.#grafts, graft.from, graft)
  }

  howDirectory(graft: Graft): 'move' | 'copy' {
    return this.#physical(graft.from) === graft.to ? 'move' : 'copy'
  }

  howFile(graft: Graft, rename: boolean): StageRecord['how'] {
    if (graft.linked && rename) return 'fill'
    if (graft.linked || this.#isShared(graft.from)) return 'copy'
    return graft.inPlace ? 'stay' : 'move'
  }

  /** Where the base's directory itself ends up; everything else that shows it gets a copy. */
  #physical(from: EntryPath): EntryPath | undefined {
    if (from === '') return '' as EntryPath
    const shown = this.#directoriesOf(from).map(({ path }) => path)
    const { parent, name } = split(from)
    const above = this.#physical(parent)
    const riding = above === undefined ? undefined : join(above, name)
    if (riding !== undefined && shown.includes(riding)) return riding
    return this.#explicit(from)[0]
  }

  #explicit(from: EntryPath): EntryPath[] {
    return (this.#grafts.get(from) ?? []).map(({ to }) => to).sort((left, right) => (left < right ? -1 : 1))
  }

  #directoriesOf(from: EntryPath): readonly Directory[] {
    if (from === '') return [rootDirectory(this.#stack)]
    const known = this.#directories.get(from)
    if (known !== undefined) return known
    const { parent, name } = split(from)
    const found = new Map<EntryPath, Directory>()
    const add = (directory: Directory) => {
      const base = directory.sources.find(({ layer }) => layer === this.#base)
      if (base?.path === from) found.set(directory.path, directory)
    }
    for (const above of this.#directoriesOf(parent)) {
      const child = lookup(this.#stack, above, name, (source, wanted) => this.#opened.inspect(source, wanted))
      if (child.kind === 'directory') add(child.directory)
    }
    for (const to of this.#explicit(from)) {
      const target = resolve(this.#stack, to, this.#opened)
      if (target.kind === 'directory') add(target.directory)
    }
    const directories = [...found.values()]
    this.#directories.set(from, directories)
    return directories
  }

  // A file of several names, or one that more than one name of the result takes its data from.
  #isShared(from: EntryPath): boolean {
    const { parent, name } = split(from)
    const nlink = withFd(openLayerDirectory(layerAt(this.#stack, this.#base), parent), (fd) => statAt(fd, name).nlink)
    if (nlink > 1) return true
    const shown = new Set<EntryPath>(this.#explicit(from))
    for (const above of this.#directoriesOf(parent)) {
      const child = lookup(this.#stack, above, name, (source, wanted) => this.#opened.inspect(source, wanted))
      if (child.kind !== 'object') continue
      if (child.data.layer === this.#base && child.data.path === from) shown.add(join(above.path, name))
    }
    return shown.size > 1
  }
}
