import type { ByteString } from '@lsync/posix'
import type { DirectoryHandle, IndexChange, NamePlace } from './model/index-change.ts'
import type { Operation, TreePath } from './model/operation.ts'
import type { Row } from './model/row.ts'

/** What lstat has just said of one name of a directory that the index knows. */
export interface Observation extends NamePlace {
  /** `undefined`: nothing is there. */
  readonly seen: Row | undefined
  /** Of directories, where the file system has handles. */
  readonly handle?: DirectoryHandle | undefined
  /** What the target has under this name is not known: it is made anew whatever the index says. */
  readonly isForced?: boolean
  /**
   * The id that a directory gets which the index does not know: so that what was found beneath it, on the way to things
   * that moved there, can be observations too.
   */
  readonly freshId?: number
}

/** What a plan is made against: the index. */
export interface IndexView {
  row(directory: number, name: ByteString): Row | undefined
  directory(
    id: number,
  ): { readonly parent: number; readonly name: ByteString; readonly handle: DirectoryHandle | undefined } | undefined
  byHandle(handle: DirectoryHandle): number | undefined
  namesOf(identity: string): readonly NamePlace[]
}

export interface PlanRequest {
  readonly observations: readonly Observation[]
  readonly index: IndexView
  readonly takeDirectoryId: () => number
  readonly takeStage: () => number
}

/** A directory whose content is to be carried over, with all beneath it. */
export interface FreshTree {
  readonly id: number
  readonly parent: number
  readonly name: ByteString
  readonly path: TreePath
  readonly identity: string
  /** The target may hold something there already. */
  readonly isDirty: boolean
}

/** A name that is no directory and whose content or metadata may have to be sent; what exactly, its content decides. */
export interface ContentTask extends NamePlace {
  readonly path: TreePath
  readonly seen: Row
  /** What the target has under this name by then; `undefined` when it has nothing that is known. */
  readonly row: Row | undefined
  /** The target has other names for the same inode, which must see the change. */
  readonly isShared: boolean
  /** The other names of the inode: they get the same row. */
  readonly others: readonly NamePlace[]
}

/** A directory that gets its metadata again, since names in it changed or it did itself. */
export interface MetaTask {
  readonly id: number
  readonly path: TreePath
  /** Another directory in its place is none of this. */
  readonly identity: string
}

export interface Plan {
  /** Not complete: these have to be looked at too, then the plan is made anew. */
  readonly alsoLook: readonly NamePlace[]
  /** What was seen contradicts itself, since it changed meanwhile: look again. */
  readonly isInconsistent: boolean
  /** In the old tree, the deepest first. */
  readonly first: readonly Operation[]
  /** In the new tree, parents first. */
  readonly second: readonly Operation[]
  readonly fresh: readonly FreshTree[]
  /** Inodes that leave and that nobody wants: if they are found inside a fresh tree, they have moved there. */
  readonly leaving: ReadonlySet<string>
  readonly contents: readonly ContentTask[]
  /** After the contents. */
  readonly links: readonly Operation[]
  /** After everything else. */
  readonly metas: readonly MetaTask[]
  /** Directories that moved: what is in them is compared again, since events of theirs may have been missed. */
  readonly rescans: readonly number[]
  /** What `first` and `second` change of the index. */
  readonly changes: readonly IndexChange[]
  /** Every name of the new tree that the plan writes to or removes; after a crash none of them is believed. */
  readonly touched: readonly TreePath[]
}

/**
 * Inodes that have more names than are known of: the index may have another one of them from a time when it was the only
 * one, and the kernel tells of the new name alone.
 */
export function missingLinks(observations: Iterable<Observation>, index: Pick<IndexView, 'namesOf'>): Set<string> {
  const names = new Map<string, Set<string>>()
  const wanted = new Map<string, number>()
  for (const observation of observations) {
    const { seen } = observation
    if (seen === undefined || !hasSeveralNames(seen)) continue
    const known = names.get(seen.identity) ?? new Set(index.namesOf(seen.identity).map(keyOf))
    known.add(keyOf(observation))
    names.set(seen.identity, known)
    wanted.set(seen.identity, seen.nlink)
  }
  return new Set(
    [...wanted].filter(([identity, nlink]) => (names.get(identity)?.size ?? 0) < nlink).map(([identity]) => identity),
  )
}

/** The directory of the index that was seen, wherever it is by now; `undefined` when it is none that the index knows. */
export function findDirectory(index: IndexView, seen: Row, handle: DirectoryHandle | undefined): number | undefined {
  const id = handle && index.byHandle(handle)
  return id !== undefined && placeOfDirectory(index, id, seen) !== undefined ? id : undefined
}

/** Where the index has a directory, if it is the one that was seen and can move at all. */
function placeOfDirectory(index: IndexView, id: number, seen: Row): NamePlace | undefined {
  const record = index.directory(id)
  if (record === undefined || record.parent === 0) return undefined
  const row = index.row(record.parent, record.name)
  if (row === undefined || row.ref !== id || row.identity !== seen.identity) return undefined
  return { directory: record.parent, name: record.name }
}

/** The ids that new directories of a plan have in the index once it is carried out, by identity. */
export function madeDirectories({ changes }: Pick<Plan, 'changes'>): Map<string, number> {
  const ids = new Set(changes.flatMap((change) => (change.set === 'new directory' ? [change.id] : [])))
  return new Map(
    changes.flatMap((change) =>
      change.set === 'row' && change.row.isDirectory && ids.has(change.row.ref)
        ? [[change.row.identity, change.row.ref]]
        : [],
    ),
  )
}

/** Whether replaying `first` after `second` has begun would undo something: a barrier has to stand between them. */
export function needsBarrier(plan: Pick<Plan, 'second'>): boolean {
  return plan.second.some((operation) => operation.do === 'in' || operation.do === 'rename')
}

/**
 * What has to be done at a target that is as the index says, so that it becomes as was observed. Total; reads and
 * writes nothing but what it is given.
 */
export function planChanges(request: PlanRequest): Plan {
  return new Planner(request).plan()
}

interface Left {
  readonly observation: Observation
  readonly row: Row
  /** Where it goes; `undefined` while nobody wants it. */
  arrival?: Observation
}

interface Placed {
  readonly parent: number
  readonly name: ByteString
}

const EMPTY: Plan = {
  alsoLook: [],
  isInconsistent: false,
  first: [],
  second: [],
  fresh: [],
  leaving: new Set(),
  contents: [],
  links: [],
  metas: [],
  rescans: [],
  changes: [],
  touched: [],
}

// A tree is not nested more deeply than this; a longer way up is a circle.
const MAX_DEPTH = 4096

class Planner {
  readonly #request: PlanRequest
  readonly #index: IndexView
  readonly #observed = new Map<string, Observation>()
  readonly #leftByIdentity = new Map<string, Left[]>()
  readonly #leftByPlace = new Map<string, Left>()
  readonly #arrivals = new Map<string, Observation>()
  /** Directories in their new places: moved ones and new ones. */
  readonly #placed = new Map<number, Placed>()
  readonly #freshIds = new Set<number>()
  /** Directories that go, by id. */
  readonly #removed = new Set<number>()
  readonly #alsoLook = new Map<string, NamePlace>()
  readonly #stayed: { observation: Observation; row: Row; seen: Row }[] = []
  readonly #paths = new Map<number, TreePath | undefined>()
  #isInconsistent = false

  constructor(request: PlanRequest) {
    this.#request = request
    this.#index = request.index
  }

  plan(): Plan {
    for (const observation of this.#request.observations) this.#classify(observation)
    for (const key of this.#observed.keys()) this.#alsoLook.delete(key)
    const groups = this.#gatherGroups()
    const fresh: { observation: Observation; seen: Row; id: number }[] = []
    const moves: { left: Left; arrival: Observation; seen: Row; id: number | undefined }[] = []
    const creations: { observation: Observation; seen: Row }[] = []
    for (const observation of this.#arrivals.values()) {
      const seen = observation.seen as Row
      if (seen.isDirectory) {
        const known = this.#knownDirectory(observation, seen)
        if (known === 'unknown') fresh.push({ observation, seen, id: 0 })
        else if (known !== undefined) moves.push({ ...known, arrival: observation, seen })
      } else if (!groups.has(seen.identity) || seen.isWhiteout) {
        const left = this.#claim(observation, seen)
        if (left !== undefined) moves.push({ left, arrival: observation, seen, id: undefined })
        else creations.push({ observation, seen })
      }
    }
    for (const group of groups.values()) this.#settleGroup(group, moves)
    if (this.#alsoLook.size > 0) return { ...EMPTY, alsoLook: [...this.#alsoLook.values()] }
    if (this.#isInconsistent) return { ...EMPTY, isInconsistent: true }

    for (const left of this.#unclaimed()) if (this.#isItsPlace(left)) this.#removed.add(left.row.ref)
    for (const { id, arrival } of moves) {
      if (id !== undefined) this.#placed.set(id, { parent: arrival.directory, name: arrival.name })
    }
    const freshTrees: { observation: Observation; seen: Row; id: number }[] = []
    for (const { observation, seen } of fresh) {
      const id = observation.freshId ?? this.#request.takeDirectoryId()
      this.#placed.set(id, { parent: observation.directory, name: observation.name })
      this.#freshIds.add(id)
      freshTrees.push({ observation, seen, id })
    }
    return this.#compose(moves, freshTrees, creations, groups)
  }

  #classify(observation: Observation): void {
    const key = keyOf(observation)
    if (this.#observed.has(key)) return
    this.#observed.set(key, observation)
    const row = this.#index.row(observation.directory, observation.name)
    const { seen, isForced } = observation
    const isSame = row !== undefined && seen !== undefined && isForced !== true && isSameObject(row, seen)
    if (isSame) {
      this.#stayed.push({ observation, row, seen })
      return
    }
    if (row === undefined && seen === undefined) {
      // Something was there for a while, which shows in the times of the directory alone.
      const record = this.#index.directory(observation.directory)
      const place = record && { directory: record.parent, name: record.name }
      if (place !== undefined) this.#alsoLook.set(keyOf(place), place)
    }
    if (row !== undefined) {
      const left: Left = { observation, row }
      this.#leftByPlace.set(key, left)
      if (isForced !== true && !row.isWhiteout) append(this.#leftByIdentity, row.identity, left)
    }
    if (seen !== undefined) this.#arrivals.set(key, observation)
  }

  /** A directory that moved while it was carried over anew may be known in its new place, and have its old name still. */
  #isItsPlace({ observation, row }: Left): boolean {
    const record = row.isDirectory ? this.#index.directory(row.ref) : undefined
    return record !== undefined && record.parent === observation.directory && record.name === observation.name
  }

  #unclaimed(): Left[] {
    return [...this.#leftByPlace.values()].filter(({ arrival }) => arrival === undefined)
  }

  /** The known directory that has arrived; `undefined` when that cannot be said yet. */
  #knownDirectory(observation: Observation, seen: Row): { left: Left; id: number } | 'unknown' | undefined {
    if (observation.isForced === true) return 'unknown'
    const here = this.#leftByIdentity.get(seen.identity)?.find(({ row }) => row.isDirectory)
    const id = here?.row.ref ?? (observation.handle && this.#index.byHandle(observation.handle))
    if (id === undefined) return 'unknown'
    const place = placeOfDirectory(this.#index, id, seen)
    if (place === undefined) return 'unknown'
    const key = keyOf(place)
    if (!this.#observed.has(key)) {
      this.#alsoLook.set(key, place)
      return undefined
    }
    const left = this.#leftByPlace.get(key)
    if (left === undefined || left.arrival !== undefined) {
      // It was seen in two places: it moved while we looked.
      this.#isInconsistent = true
      return undefined
    }
    if (left.observation.isForced === true) return 'unknown'
    left.arrival = observation
    return { left, id }
  }

  /** The object of this inode that has left another name, if it may be moved. */
  #claim(observation: Observation, seen: Row): Left | undefined {
    if (observation.isForced === true || seen.isWhiteout) return undefined
    const left = this.#leftByIdentity
      .get(seen.identity)
      ?.find(({ row, arrival }) => arrival === undefined && row.type === seen.type)
    if (left !== undefined) left.arrival = observation
    return left
  }

  #gatherGroups(): Map<string, Group> {
    const groups = new Map<string, Group>()
    const groupOf = (identity: string): Group => {
      const known = groups.get(identity)
      if (known !== undefined) return known
      const made: Group = { identity, stayed: [], arrived: [], hasLost: false, carrier: undefined }
      groups.set(identity, made)
      return made
    }
    const involves = (row: Row | undefined) => row !== undefined && hasSeveralNames(row)
    for (const { row, seen } of this.#stayed) if (involves(row) || involves(seen)) groupOf(seen.identity)
    // What was done through a name that is gone shows at the others.
    for (const { row } of this.#leftByPlace.values()) if (involves(row)) groupOf(row.identity).hasLost = true
    for (const observation of this.#arrivals.values()) {
      const seen = observation.seen as Row
      const left = this.#leftByIdentity.get(seen.identity)
      if (involves(seen) || left?.some(({ row }) => involves(row)) === true) groupOf(seen.identity)
    }
    for (const { observation, row, seen } of this.#stayed)
      groups.get(seen.identity)?.stayed.push({ observation, row, seen })
    for (const observation of this.#arrivals.values()) {
      const seen = observation.seen as Row
      if (!seen.isDirectory && !seen.isWhiteout) groups.get(seen.identity)?.arrived.push(observation)
    }
    for (const group of groups.values()) {
      if (!isChangedGroup(group) && !group.hasLost) continue
      for (const place of this.#index.namesOf(group.identity)) {
        if (!this.#observed.has(keyOf(place))) this.#alsoLook.set(keyOf(place), place)
      }
    }
    return groups
  }

  // The names of one inode: one of them stays or is brought, the others are linked to it.
  #settleGroup(group: Group, moves: { left: Left; arrival: Observation; seen: Row; id: number | undefined }[]): void {
    if (group.stayed.length > 0) return
    const [first] = group.arrived
    if (first === undefined) return
    const left = this.#claim(first, first.seen as Row)
    if (left === undefined) return
    group.carrier = left
    moves.push({ left, arrival: first, seen: first.seen as Row, id: undefined })
  }

  #compose(
    moves: readonly { left: Left; arrival: Observation; seen: Row; id: number | undefined }[],
    freshTrees: readonly { observation: Observation; seen: Row; id: number }[],
    creations: readonly { observation: Observation; seen: Row }[],
    groups: ReadonlyMap<string, Group>,
  ): Plan {
    const first: { path: TreePath; operation: Operation }[] = []
    const second: { path: TreePath; operation: Operation }[] = []
    const contents: ContentTask[] = []
    const links: Operation[] = []
    const changes: IndexChange[] = []
    const touched = new Set<TreePath>()
    const metas = new Map<number, TreePath>()
    const rescans: number[] = []
    const newPathOf = (place: NamePlace): TreePath | undefined => {
      const parent = this.#newPath(place.directory)
      return parent === undefined ? undefined : join(parent, place.name)
    }
    const touchParent = (directory: number) => {
      const path = this.#newPath(directory)
      if (path !== undefined && directory !== 0) metas.set(directory, path)
    }

    for (const { left, arrival, seen, id } of moves) {
      const from = this.#oldPathOf(left.observation)
      const to = newPathOf(arrival)
      if (this.#isInconsistent) return this.#incomplete()
      touchParent(left.observation.directory)
      touchParent(arrival.directory)
      if (to === undefined) {
        // Its new place has gone meanwhile, and with it this.
        first.push({ path: from, operation: { do: 'remove', path: from } })
        this.#dropRow(left, changes)
        if (id !== undefined) changes.push({ set: 'no directory', id })
        continue
      }
      if (this.#isSimple(left)) second.push({ path: to, operation: { do: 'rename', from, to } })
      else {
        const stage = this.#request.takeStage()
        first.push({ path: from, operation: { do: 'out', path: from, stage } })
        second.push({ path: to, operation: { do: 'in', stage, path: to } })
      }
      this.#dropRow(left, changes)
      changes.push({
        set: 'row',
        directory: arrival.directory,
        row: left.row.with({ name: arrival.name, settled: false }),
      })
      if (id !== undefined) {
        changes.push({ set: 'place', id, parent: arrival.directory, name: arrival.name })
        metas.set(id, to)
        rescans.push(id)
      } else if (!groups.has(seen.identity)) {
        contents.push({ ...placeOf(arrival), path: to, seen, row: left.row, isShared: false, others: [] })
      }
    }
    const fresh: FreshTree[] = []
    for (const { observation, seen, id } of freshTrees) {
      const path = newPathOf(observation)
      if (path === undefined) continue
      touchParent(observation.directory)
      touched.add(path)
      second.push({ path, operation: { do: 'directory', path } })
      const { directory, name, handle } = observation
      // What lies beneath a new directory is carried over with it.
      if (!this.#freshIds.has(directory)) {
        fresh.push({
          id,
          parent: directory,
          name,
          path,
          identity: seen.identity,
          isDirty: observation.isForced === true,
        })
      }
      changes.push({ set: 'new directory', id, parent: directory, name, handle })
      changes.push({ set: 'row', directory, row: seen.with({ ref: id, settled: false }) })
    }
    for (const { observation, seen } of creations) {
      const path = newPathOf(observation)
      if (path === undefined) continue
      touchParent(observation.directory)
      contents.push({ ...placeOf(observation), path, seen, row: undefined, isShared: false, others: [] })
    }
    for (const { observation, row, seen } of this.#stayed) {
      if (isUnchangedRow(row, seen) || groups.has(seen.identity)) continue
      const path = newPathOf(observation)
      if (path === undefined) continue
      if (seen.isDirectory) {
        metas.set(row.ref, path)
        // It may have been away and come back.
        touchParent(observation.directory)
      } else contents.push({ ...placeOf(observation), path, seen, row, isShared: false, others: [] })
    }
    for (const group of groups.values()) this.#composeGroup(group, newPathOf, touchParent, contents, links)
    for (const left of this.#unclaimed()) {
      const { observation, row } = left
      touchParent(observation.directory)
      const newPath = newPathOf(observation)
      if (newPath !== undefined) touched.add(newPath)
      const isBeneathRemoved = this.#isBeneathRemoved(observation.directory)
      const arrival = this.#arrivals.get(keyOf(observation))
      // What comes in its place replaces it in one step; until then it is there, and the index says so.
      if (!isBeneathRemoved && !row.isDirectory && arrival?.seen !== undefined && !arrival.seen.isDirectory) continue
      this.#dropRow(left, changes)
      if (this.#isItsPlace(left)) changes.push({ set: 'no directory', id: row.ref })
      else if (row.isFile && row.ref !== 0 && row.nlink === 1) changes.push({ set: 'no blocks', id: row.ref })
      if (isBeneathRemoved) continue
      // It may be what it is to become: then what is in it is held against what comes.
      if (row.isDirectory && arrival?.isForced === true && arrival.seen?.isDirectory === true) continue
      const path = this.#oldPathOf(observation)
      first.push({ path, operation: { do: 'remove', path } })
    }
    // Something may be there that the index never knew.
    for (const observation of this.#observed.values()) {
      if (observation.isForced !== true || observation.seen !== undefined) continue
      const path = newPathOf(observation)
      if (path === undefined || this.#leftByPlace.has(keyOf(observation))) continue
      touchParent(observation.directory)
      first.push({ path, operation: { do: 'remove', path } })
      touched.add(path)
    }
    if (this.#isInconsistent) return this.#incomplete()
    for (const { path, directory, others } of contents) {
      touched.add(path)
      // A file is replaced by a rename, which its directory's time shows even where the upper's was only written to.
      for (const place of [{ directory }, ...others]) touchParent(place.directory)
    }
    for (const operation of links) if (operation.do === 'link') touched.add(operation.path)
    for (const { path } of second) touched.add(path)
    return {
      ...EMPTY,
      first: first
        .sort((one, other) => depthOf(other.path) - depthOf(one.path) || compare(one.path, other.path))
        .map(operationOf),
      second: second.sort((one, other) => compare(one.path, other.path)).map(operationOf),
      fresh,
      leaving: new Set(
        this.#unclaimed()
          .filter(({ row, observation }) => !row.isWhiteout && observation.isForced !== true)
          .map(({ row }) => row.identity),
      ),
      contents: contents.sort((one, other) => compare(one.path, other.path)),
      links,
      metas: [...metas]
        .map(([id, path]) => ({ id, path, identity: this.#identityOf(id) }))
        .sort((one, other) => compare(other.path, one.path)),
      rescans,
      changes: changes.sort((one, other) => order(one) - order(other)),
      touched: [...touched].sort(compare),
    }
  }

  #composeGroup(
    group: Group,
    newPathOf: (place: NamePlace) => TreePath | undefined,
    touchParent: (directory: number) => void,
    contents: ContentTask[],
    links: Operation[],
  ): void {
    if (!isChangedGroup(group)) return
    const stayed = group.stayed.filter(({ observation }) => newPathOf(observation) !== undefined)
    const arrived = group.arrived.filter((observation) => newPathOf(observation) !== undefined)
    // Names that had the inode for themselves when they were carried over are not linked at the target yet.
    const linked = stayed.filter(({ row }) => row.nlink > 1)
    const [first] = linked.length > 0 ? linked : stayed
    const base = first?.observation ?? arrived[0]
    if (base === undefined) return
    const path = newPathOf(base) as TreePath
    const solitary = stayed
      .filter((one) => one !== first && !linked.includes(one))
      .map(({ observation }) => observation)
    const toLink = [...solitary, ...arrived].filter((observation) => observation !== base)
    for (const observation of [...arrived, ...toLink]) touchParent(observation.directory)
    for (const observation of toLink) links.push({ do: 'link', path: newPathOf(observation) as TreePath, to: path })
    const others = [...stayed.map(({ observation }) => observation), ...arrived].filter((other) => other !== base)
    contents.push({
      ...placeOf(base),
      path,
      seen: base.seen as Row,
      row: first?.row ?? (group.carrier?.arrival === base ? group.carrier.row : undefined),
      isShared: linked.length > 1,
      others: others.map(placeOf),
    })
  }

  #dropRow({ observation }: Left, changes: IndexChange[]): void {
    changes.push({ set: 'no row', directory: observation.directory, name: observation.name })
  }

  #identityOf(id: number): string {
    if (this.#freshIds.has(id)) {
      const { parent, name } = this.#placed.get(id) as Placed
      return this.#arrivals.get(keyOf({ directory: parent, name }))?.seen?.identity ?? ''
    }
    const record = this.#index.directory(id)
    return (record && this.#index.row(record.parent, record.name)?.identity) ?? ''
  }

  /** One rename will do: nothing else happens to the old name, and every directory on the way to it stays where it is. */
  #isSimple(left: Left): boolean {
    if (this.#arrivals.has(keyOf(left.observation))) return false
    for (let at = left.observation.directory, depth = 0; at > 1; depth++) {
      if (depth > MAX_DEPTH || this.#placed.has(at) || this.#removed.has(at)) return false
      at = this.#index.directory(at)?.parent ?? 0
    }
    return true
  }

  #isBeneathRemoved(directory: number): boolean {
    for (let at = directory, depth = 0; at > 0 && depth < MAX_DEPTH; depth++) {
      if (this.#removed.has(at)) return true
      // What is in a directory that moves away from there goes with it.
      if (this.#placed.has(at)) return false
      at = this.#index.directory(at)?.parent ?? 0
    }
    return false
  }

  /** Where a name is at the target before the plan. */
  #oldPathOf({ directory, name }: NamePlace): TreePath {
    let path: string = name
    for (let at = directory, depth = 0; at > 1; depth++) {
      const record = this.#index.directory(at)
      if (record === undefined || depth > MAX_DEPTH) {
        this.#isInconsistent = true
        return path as TreePath
      }
      path = `${record.name}/${path}`
      at = record.parent
    }
    return path as TreePath
  }

  /** Where a directory is after the plan; `undefined` when it is gone. */
  #newPath(directory: number): TreePath | undefined {
    if (directory <= 1) return '' as TreePath
    if (this.#paths.has(directory)) return this.#paths.get(directory)
    const path = this.#findNewPath(directory)
    this.#paths.set(directory, path)
    return path
  }

  // A circle: one of the directories in it has moved, and nobody has looked where it was.
  #lookAround(directory: number): void {
    const seen = new Set<number>()
    for (let at = directory; at > 1 && !seen.has(at); ) {
      seen.add(at)
      const placed = this.#placed.get(at)
      const record = this.#index.directory(at)
      const place = record && { directory: record.parent, name: record.name }
      if (placed === undefined && place !== undefined && !this.#observed.has(keyOf(place))) {
        this.#alsoLook.set(keyOf(place), place)
      }
      at = (placed ?? record)?.parent ?? 0
    }
  }

  #incomplete(): Plan {
    if (this.#alsoLook.size > 0) return { ...EMPTY, alsoLook: [...this.#alsoLook.values()] }
    return { ...EMPTY, isInconsistent: true }
  }

  #findNewPath(directory: number): TreePath | undefined {
    let path = ''
    for (let at = directory, depth = 0; at > 1; depth++) {
      if (depth > MAX_DEPTH) {
        this.#isInconsistent = true
        this.#lookAround(at)
        return undefined
      }
      const place = this.#placed.get(at) ?? this.#index.directory(at)
      if (place === undefined || this.#removed.has(at)) return undefined
      path = path === '' ? place.name : `${place.name}/${path}`
      at = place.parent
    }
    return path as TreePath
  }
}

interface Group {
  readonly identity: string
  readonly stayed: { readonly observation: Observation; readonly row: Row; readonly seen: Row }[]
  readonly arrived: Observation[]
  hasLost: boolean
  /** The name that is moved where none stays. */
  carrier: Left | undefined
}

function isChangedGroup({ arrived, stayed }: Group): boolean {
  return arrived.length > 0 || stayed.some(({ row, seen }) => !isUnchangedRow(row, seen))
}

/** Whether a row says of an inode what was seen, its change time included. */
export function isUnchangedRow(row: Row, seen: Row): boolean {
  return row.isSettled && row.isSameLook(seen)
}

function isSameObject(row: Row, seen: Row): boolean {
  // A whiteout's inode is that of many others, and comes and goes with them.
  if (row.isWhiteout || seen.isWhiteout) return row.isWhiteout && seen.isWhiteout
  return row.identity === seen.identity && row.type === seen.type
}

function hasSeveralNames(row: Row): boolean {
  return row.nlink > 1 && !row.isDirectory && !row.isWhiteout
}

function keyOf({ directory, name }: NamePlace): string {
  return `${directory}/${name}`
}

function placeOf({ directory, name }: NamePlace): NamePlace {
  return { directory, name }
}

function append<T>(map: Map<string, T[]>, key: string, value: T): void {
  const list = map.get(key)
  if (list === undefined) map.set(key, [value])
  else list.push(value)
}

function operationOf({ operation }: { operation: Operation }): Operation {
  return operation
}

function compare(one: string, other: string): number {
  return one < other ? -1 : one > other ? 1 : 0
}

function depthOf(path: string): number {
  let depth = 0
  for (let at = path.indexOf('/'); at >= 0; at = path.indexOf('/', at + 1)) depth++
  return depth
}

function join(parent: TreePath, name: ByteString): TreePath {
  return (parent === '' ? name : `${parent}/${name}`) as TreePath
}

// Rows go before others come in their place, and what has moved out of a directory is no longer removed with it.
const ORDER: Readonly<Record<IndexChange['set'], number>> = {
  'no row': 0,
  place: 1,
  'no directory': 2,
  'new directory': 3,
  directory: 3,
  row: 4,
  pages: 5,
  blocks: 6,
  'no blocks': 6,
  pending: 6,
}

function order(change: IndexChange): number {
  return ORDER[change.set]
}
