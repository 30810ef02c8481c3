import { removeTree } from '@lsync/overlay-merge'
import {
  AT_FDCWD,
  type ByteString,
  close,
  errnoOf,
  fsync,
  type HostPath,
  LsyncError,
  makeDirectory,
  O_NOFOLLOW,
  openat,
  openRoot,
  PosixError,
  printable,
  randomHex,
  realPath,
  rename,
  statFd,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { z } from 'zod'
import { DIRECTORY_FLAGS, ensureDirectory, isOursAlone, namesIn, tryOpenDirectory } from './directory.ts'
import { chooseLayers } from './layer-choice.ts'
import { type Lease, LeaseLostError } from './lease.ts'
import { createRecord, type RecordPlace, readRecord, removeRecord, replaceRecord } from './record-file.ts'
import {
  FenceRecord,
  LayerRecord,
  MountedRecord,
  RECORD_ID,
  RecordDamagedError,
  RootRecord,
  VersionRecord,
} from './records.ts'
import { sweepGone, throwAway } from './throw-away.ts'

/** What is named as a home is none: nothing is there, or `init` did not come to its end. */
export class HomeMissingError extends LsyncError {
  constructor(path: string) {
    super('HOME_MISSING', `${printable(path)} is no home of a root`, {
      path,
      hint: 'mount the store, or make the home with `lsync root init`',
    })
  }
}

/** A home that is to be made is there already. */
export class HomeExistsError extends LsyncError {
  constructor(path: string) {
    super('HOME_EXISTS', `${printable(path)} exists already`, {
      path,
      hint: 'name a directory that does not exist yet',
    })
  }
}

/** A directory has what homes have, and not the record that makes it one: what is in it may be all that is left of a root. */
export class HomeDamagedError extends LsyncError {
  constructor(path: string) {
    super('HOME_DAMAGED', `${printable(path)} has lost its root.json`, {
      path,
      hint: 'restore root.json from a backup of the store, or name another directory; nothing was changed',
    })
  }
}

/** Others than the user that lsync runs as could write the home. */
export class HomeUntrustedError extends LsyncError {
  constructor(path: string) {
    super('HOME_UNTRUSTED', `${printable(path)} does not belong to this user alone`, {
      path,
      hint: 'give it to the user that lsync runs as, with mode 0700, once it is known who wrote what is in it',
    })
  }
}

/** No version with this number or tag. */
export class VersionUnknownError extends LsyncError {
  constructor(path: string, version: string) {
    super('VERSION_UNKNOWN', `${printable(path)} has no version ${printable(version)}`, {
      path,
      hint: 'see `lsync root versions`',
    })
  }
}

/** A layer that a version needs is not in the home, in no form. */
export class LayerMissingError extends LsyncError {
  constructor(path: string, layers: readonly string[]) {
    super('LAYER_MISSING', `${printable(path)} lacks layers that its version needs: ${layers.join(', ')}`, {
      path,
      hint: 'restore them from a backup of the store, or roll back to another version',
    })
  }
}

export type VersionDraft = Omit<VersionRecord, 'format' | 'number' | 'epoch' | 'createdAtMs'>

const DIRECTORIES = ['layers', 'versions', 'mounted', 'incoming', 'trash', 'lease'] as const
type HomeDirectory = (typeof DIRECTORIES)[number]
const ROOT_JSON = 'root.json' as ByteString
const INIT_JSON = 'init.json' as ByteString
const LAYER_JSON = 'layer.json' as ByteString
const TREE = 'tree' as ByteString
const SYNC_STATE = '.lsync.sync.tree' as ByteString
const NumberedRecord = z.union([VersionRecord, FenceRecord])
const VERSION_FILE = /^([1-9]\d{0,14})\.json$/
const TRASHED_LAYER = /^layer-([0-9a-f]{32})$/
const TRASHED_VERSION = /^version-[1-9]\d{0,14}\.json$/

/**
 * A root on a store, by the layout of docs/format.md, "The home of a root". Nothing in it is followed or believed: all is
 * opened beneath the home, without symlinks, and each record is checked when it is read.
 */
export class Home {
  readonly path: HostPath
  readonly record: RootRecord
  readonly #fd: number

  private constructor(path: HostPath, fd: number, record: RootRecord) {
    this.path = path
    this.#fd = fd
    this.record = record
  }

  /**
   * Opens a home; `close` it.
   * @throws {HomeMissingError}, {HomeUntrustedError}, and what reading `root.json` throws
   */
  static open(path: HostPath): Home {
    const real = realHome(path)
    const fd = openRoot(real)
    try {
      if (!isOursAlone(fd)) throw new HomeUntrustedError(real)
      const record = readRecord({ fd, path: real }, ROOT_JSON, RootRecord)
      if (record === undefined) throw new HomeMissingError(real)
      return new Home(real, fd, record)
    } catch (error) {
      close(fd)
      throw error
    }
  }

  /**
   * Makes a home. `fill` puts its layers and first version into it; only then it counts. What an earlier `create` left half
   * made, and nothing else, is made anew.
   * @throws {HomeExistsError} if the path is there and is no half-made home; {HomeDamagedError} if it was a whole one
   */
  static async create(path: HostPath, record: RootRecord, fill: (home: Home) => Promise<void>): Promise<Home> {
    const fd = openNewHome(path)
    const home = new Home(realPath(path), fd, record)
    const place = { fd, path: home.path }
    try {
      // As long as it has this name, nobody has written anything else into the home.
      replaceRecord(place, INIT_JSON, record)
      for (const name of DIRECTORIES) {
        removeTree(fd, name as ByteString)
        makeDirectory(fd, name as ByteString, 0o700)
      }
      await fill(home)
      fsync(fd, home.path)
      move(fd, INIT_JSON, fd, ROOT_JSON)
      return home
    } catch (error) {
      close(fd)
      throw error
    }
  }

  close(): void {
    close(this.#fd)
  }

  /** The directory that was opened, for records beside `root.json`: whatever is mounted on its path since, this is the home. */
  get place(): RecordPlace {
    return { fd: this.#fd, path: this.path }
  }

  /** Whether the path still leads to what was opened. A store whose client died, or that was mounted anew, has to be opened again. */
  isInPlace(): boolean {
    try {
      const [here, there] = [statFd(this.#fd), withFd(openRoot(this.path), statFd)]
      return here.dev === there.dev && here.ino === there.ino
    } catch (cause) {
      if (!(cause instanceof PosixError)) throw cause
      return false
    }
  }

  /** Where leases are kept, for `FileLeases`. */
  get leaseDirectory(): string {
    return `${this.path}/lease`
  }

  /** All versions that count, oldest first: none that was published under an older lease than one before it. */
  versions(): VersionRecord[] {
    return this.#readVersions().counting
  }

  /** The numbers of those that do not count, below the newest that does: without those before them they would. */
  overtakenVersions(): number[] {
    const { counting, overtaken } = this.#readVersions()
    const head = counting.at(-1)?.number ?? 0
    return overtaken.filter((number) => number < head)
  }

  /** The fences below the newest version that counts, which does the same. Those that they overtook must be gone before. */
  neededNoMoreFences(): number[] {
    const { counting, fences } = this.#readVersions()
    const head = counting.at(-1)?.number ?? 0
    return fences.filter((number) => number < head)
  }

  #readVersions(): {
    readonly counting: VersionRecord[]
    readonly overtaken: number[]
    readonly fences: number[]
  } {
    return this.#in('versions', (place) => {
      let epoch = 0
      const versions: VersionRecord[] = []
      const overtaken: number[] = []
      const fences: number[] = []
      for (const number of numbersIn(place)) {
        const version = readRecord(place, `${number}.json` as ByteString, NumberedRecord)
        // Taken away by a gc meanwhile.
        if (version === undefined) continue
        if (version.number !== number) {
          throw new RecordDamagedError(`${place.path}/${number}.json`, `it says that it is version ${version.number}`)
        }
        if (version.epoch < epoch) {
          overtaken.push(number)
          continue
        }
        epoch = version.epoch
        if ('isFence' in version) fences.push(number)
        else versions.push(version)
      }
      return { counting: versions, overtaken, fences }
    })
  }

  /** The newest version. @throws {VersionUnknownError} if there is none */
  head(): VersionRecord {
    const head = this.versions().at(-1)
    if (head === undefined) throw new VersionUnknownError(this.path, 'at all')
    return head
  }

  /** A version by its number or one of its tags (the newest that has it); default the newest. @throws {VersionUnknownError} */
  version(which?: number | string): VersionRecord {
    if (which === undefined) return this.head()
    const versions = this.versions()
    const found =
      versions.find(({ number }) => String(number) === String(which)) ??
      versions.findLast(({ tags }) => tags?.includes(String(which)) === true)
    if (found === undefined) throw new VersionUnknownError(this.path, String(which))
    return found
  }

  /**
   * Publishes a version as the newest one. The lease is checked right before.
   * @throws {LeaseLostError} if another node may write meanwhile; {LayerMissingError} if a layer is not there
   */
  async publishVersion(draft: VersionDraft, lease: Pick<Lease, 'epoch' | 'check'>): Promise<VersionRecord> {
    this.requireLayers(draft.layers)
    for (;;) {
      await lease.check()
      const version = this.#createVersion(draft, lease.epoch)
      if (version === undefined) continue
      // Between the check and the creation others may have claimed the root and published: then this one does not count.
      if (!this.versions().some(({ number }) => number === version.number)) {
        throw new LeaseLostError(this.leaseDirectory, lease.epoch, 'another node has published meanwhile')
      }
      // Before a version named them, a gc could have taken them.
      this.requireLayers(draft.layers)
      return version
    }
  }

  /**
   * Sees to it that nothing counts that is published from now on under an older lease: its holder may have looked whether it
   * stands, and slept since. To be done after a lease was taken over, before the newest version is looked for.
   */
  fence(epoch: number): void {
    for (let isDone = false; !isDone; ) {
      isDone = this.#in('versions', (place) => {
        const number = Math.max(0, ...numbersIn(place, true)) + 1
        const record: FenceRecord = { format: 1, number, epoch, isFence: true }
        return createRecord(place, `${number}.json` as ByteString, record)
      })
    }
  }

  /** Removes what claims of numbers left that are below the newest version. */
  dropOldClaims(): void {
    const head = this.versions().at(-1)?.number ?? 0
    this.#in('versions', ({ fd }) => {
      for (const name of namesIn(fd)) {
        if (Number(/^([1-9]\d{0,14})\.claim$/.exec(name)?.[1] ?? head) < head) removeTree(fd, name)
      }
    })
  }

  /** The first version, which nobody needs a lease for. */
  publishFirst(draft: VersionDraft): VersionRecord {
    const version = this.#createVersion(draft, 0)
    if (version === undefined) throw new HomeExistsError(this.path)
    return version
  }

  #createVersion(draft: VersionDraft, epoch: number): VersionRecord | undefined {
    return this.#in('versions', (place) => {
      const number = Math.max(0, ...numbersIn(place, true)) + 1
      const version = VersionRecord.parse({ format: 1, number, epoch, createdAtMs: Date.now(), ...draft })
      return createRecord(place, `${number}.json` as ByteString, version) ? version : undefined
    })
  }

  /** Every layer of the home. One whose record cannot be read is none: nobody mounts it, and `gc` keeps it. */
  layers(): LayerRecord[] {
    return this.#in('layers', ({ fd }) => namesIn(fd).flatMap((name) => this.layer(name) ?? []))
  }

  /** The record of a layer; `undefined` if it is not there. */
  layer(id: string): LayerRecord | undefined {
    if (!RECORD_ID.test(id)) return undefined
    const fd = this.#tryOpenLayer(id)
    if (fd === undefined) return undefined
    return withFd(fd, () => {
      const record = readRecord({ fd, path: this.layerPath(id) }, LAYER_JSON, LayerRecord)
      if (record !== undefined && record.id !== id) {
        throw new RecordDamagedError(`${this.layerPath(id)}/layer.json`, `it says that it is layer ${record.id}`)
      }
      return record
    })
  }

  layerPath(id: string): HostPath {
    return `${this.path}/layers/${id}` as HostPath
  }

  /** The tree of a layer: an fd to be closed. */
  openLayerTree(id: string): number {
    const fd = this.#tryOpenLayer(id)
    if (fd === undefined) throw new LayerMissingError(this.path, [id])
    return withFd(fd, () => openat(fd, TREE, DIRECTORY_FLAGS))
  }

  #tryOpenLayer(id: string): number | undefined {
    return this.#in('layers', ({ fd }) => tryOpenDirectory(fd, id as ByteString))
  }

  /**
   * The layers to mount for a version's list, by what each costs (see `chooseLayers`). What a `gc` is taking away is taken back.
   * @throws {LayerMissingError}
   */
  requireLayers(list: readonly string[], costOf?: (layer: LayerRecord) => number): readonly LayerRecord[] {
    const chosen = chooseLayers(list, this.layers(), costOf)
    if (chosen !== undefined) return chosen
    this.restoreTrashed((record) => record.covers.some((id) => list.includes(id)))
    const layers = this.layers()
    const again = chooseLayers(list, layers, costOf)
    if (again !== undefined) return again
    const covered = new Set(layers.flatMap(({ covers }) => covers))
    throw new LayerMissingError(
      this.path,
      list.filter((id) => !covered.has(id)),
    )
  }

  /** What the nodes have in use. */
  mounted(): MountedRecord[] {
    return this.#in('mounted', (place) =>
      namesIn(place.fd).flatMap((name) =>
        name.endsWith('.json') && !name.startsWith('.') ? (readRecord(place, name, MountedRecord) ?? []) : [],
      ),
    )
  }

  recordMounted(record: MountedRecord): void {
    this.#in('mounted', (place) => replaceRecord(place, `${record.id}.json` as ByteString, MountedRecord.parse(record)))
  }

  forgetMounted(id: string): void {
    this.#in('mounted', (place) => removeRecord(place, `${id}.json` as ByteString))
  }

  /** Where the copy of an upper is kept up to date under a lease: made with its parents. `tree` in it is for `openSync`. */
  makeIncoming(epoch: number, id: string): HostPath {
    this.#makeEpoch(epoch)
    return this.#inEpoch(epoch, (fd, path) => {
      ensureDirectory(fd, id as ByteString)
      return `${path}/${id}` as HostPath
    })
  }

  /** The epochs that have a copy of this upper, newest first. */
  incomingEpochs(id: string): number[] {
    return this.#in('incoming', ({ fd }) =>
      namesIn(fd)
        .filter((name) => /^\d{1,15}$/.test(name) && statBeneath(fd, name, id as ByteString))
        .map(Number)
        .sort((left, right) => right - left),
    )
  }

  /**
   * Removes what lies in `incoming` of no use: copies of uppers from before `epoch`, which nobody may publish any more, and what killed
   * processes left half made before `oldMs` (with no lease, as epoch 0). Gives the names.
   */
  removeOldIncoming(epoch: number, oldMs: number, dryRun: boolean): string[] {
    const epochs = this.#in('incoming', ({ fd }) =>
      namesIn(fd)
        .filter((name) => /^\d{1,15}$/.test(name))
        .map(Number),
    )
    return epochs.flatMap((one) => {
      if (one >= epoch && one > 0) return []
      const old = this.#inEpoch(one, (fd) =>
        namesIn(fd).filter((name) => one > 0 || Number(tryStatAt(fd, name)?.mtimeNs ?? 0n) / 1e6 < oldMs),
      )
      if (!dryRun) for (const name of old) this.removeIncoming(one, name)
      return old.map((name) => `${one}/${name}`)
    })
  }

  /** Moves the copy of an upper from one lease's directory to another's: the same node got a new lease. */
  moveIncoming(id: string, fromEpoch: number, toEpoch: number): void {
    if (fromEpoch === toEpoch || !this.incomingEpochs(id).includes(fromEpoch)) return
    this.#makeEpoch(toEpoch)
    this.#inEpoch(fromEpoch, (fromFd) =>
      this.#inEpoch(toEpoch, (toFd) => move(fromFd, id as ByteString, toFd, id as ByteString)),
    )
  }

  /**
   * Makes the copy `name` (an id, or another directory there) a layer, by one rename. All of its `tree` must be durable. May be
   * repeated, also after it was done.
   */
  promote(epoch: number, name: string, record: LayerRecord): void {
    this.#inEpoch(epoch, (epochFd, path) => {
      if (tryStatAt(epochFd, name as ByteString) === undefined && this.layer(record.id) !== undefined) return
      withFd(openat(epochFd, name as ByteString, DIRECTORY_FLAGS), (fd) => {
        replaceRecord({ fd, path: `${path}/${name}` as HostPath }, LAYER_JSON, LayerRecord.parse(record))
      })
      this.#in('layers', ({ fd }) => move(epochFd, name as ByteString, fd, record.id as ByteString))
    })
  }

  /** Moves a tree of this store, durable and nobody else's, into a layer of its own. Gives its id. */
  adoptTree(tree: HostPath, { isBottom, madeBy }: Pick<LayerRecord, 'isBottom' | 'madeBy'>): string {
    const record = newLayer({ isBottom, madeBy })
    const { id } = record
    const place = this.makeIncoming(0, id)
    withFd(openRoot(place, O_NOFOLLOW), (fd) => rename(AT_FDCWD, tree, fd, TREE))
    this.promote(0, id, record)
    return id
  }

  /** Takes back `promote` of a layer that no version names: it is the copy of an upper again, with the sync's state. */
  demote(epoch: number, id: string): void {
    this.#makeEpoch(epoch)
    this.#inEpoch(epoch, (epochFd) => {
      this.#in('layers', ({ fd }) => {
        if (tryStatAt(fd, id as ByteString) !== undefined) move(fd, id as ByteString, epochFd, id as ByteString)
      })
    })
  }

  /** Once a version names the layer, nothing is synced into it any more. */
  forgetSyncState(id: string): void {
    const fd = this.#tryOpenLayer(id)
    if (fd !== undefined) withFd(fd, () => removeTree(fd, SYNC_STATE))
  }

  /** Removes what lies in `incoming/<epoch>/<name>`: first it loses its name, then its content. */
  removeIncoming(epoch: number, name: string): void {
    try {
      this.#in('trash', (trash) => this.#inEpoch(epoch, (fd) => throwAway(fd, name as ByteString, trash.fd)))
    } catch (cause) {
      if (errnoOf(cause) !== 'ENOENT') throw cause
    }
  }

  /** A tree that is being made for a layer: `use` gets a directory in `incoming/<epoch>`, which is gone afterwards. */
  async withScratch<T>(epoch: number, id: string, use: (path: HostPath, name: string) => Promise<T>): Promise<T> {
    const name = `.clone-${id}`
    this.#makeEpoch(epoch)
    this.removeIncoming(epoch, name)
    this.#inEpoch(epoch, (fd) => makeDirectory(fd, name as ByteString, 0o700))
    try {
      return await use(`${this.path}/incoming/${epoch}/${name}` as HostPath, name)
    } finally {
      this.removeIncoming(epoch, name)
    }
  }

  /** Takes a layer out of sight. It can come back (`restoreTrashed`) until the trash is emptied. */
  trashLayer(id: string): void {
    this.#in('layers', (layers) =>
      this.#in('trash', (trash) => {
        moveIfThere(layers.fd, id as ByteString, trash.fd, `layer-${id}` as ByteString)
      }),
    )
  }

  /** Takes a version out of sight, for good. */
  trashVersion(number: number): void {
    this.#in('versions', (versions) =>
      this.#in('trash', (trash) => {
        moveIfThere(versions.fd, `${number}.json` as ByteString, trash.fd, `version-${number}.json` as ByteString)
      }),
    )
  }

  /** The layers in the trash. */
  trashedLayers(): LayerRecord[] {
    return this.#in('trash', (trash) => trashedLayers(trash).map(({ record }) => record))
  }

  /** Brings the layers in the trash back that somebody needs; gives their ids. */
  restoreTrashed(isNeeded: (layer: LayerRecord) => boolean): string[] {
    return this.#in('layers', (layers) =>
      this.#in('trash', (trash) =>
        trashedLayers(trash).flatMap(({ name, record }) => {
          if (!isNeeded(record)) return []
          moveIfThere(trash.fd, name, layers.fd, record.id as ByteString)
          return [record.id]
        }),
      ),
    )
  }

  /** The names in the trash: what was taken out of sight so far. */
  trashNames(): string[] {
    return this.#in('trash', ({ fd }) => namesIn(fd))
  }

  /**
   * Removes what had these names in the trash. Whoever asks has looked whether somebody needs them after it had listed them: what
   * came there later, another one is about to look at.
   */
  emptyTrash(names: readonly string[]): void {
    this.#in('trash', ({ fd }) => {
      for (const name of names) {
        if (TRASHED_VERSION.test(name) || TRASHED_LAYER.test(name)) throwAway(fd, name as ByteString)
      }
      sweepGone(fd)
      fsync(fd)
    })
  }

  #makeEpoch(epoch: number): void {
    this.#in('incoming', ({ fd }) => ensureDirectory(fd, String(epoch) as ByteString))
  }

  #inEpoch<T>(epoch: number, use: (fd: number, path: HostPath) => T): T {
    return this.#in('incoming', ({ fd, path }) =>
      withFd(openat(fd, String(epoch) as ByteString, DIRECTORY_FLAGS), (epochFd) =>
        use(epochFd, `${path}/${epoch}` as HostPath),
      ),
    )
  }

  // Opened each time: hundreds of roots in one process would otherwise hold thousands of descriptors on the store.
  #in<T>(directory: HomeDirectory, use: (place: RecordPlace) => T): T {
    return withFd(openat(this.#fd, directory as ByteString, DIRECTORY_FLAGS), (fd) =>
      use({ fd, path: `${this.path}/${directory}` as HostPath }),
    )
  }
}

/** The record of a layer of a tree that nobody else has; `covers` where it stands for others. */
export function newLayer(
  about: Pick<LayerRecord, 'isBottom' | 'madeBy'> & Partial<Pick<LayerRecord, 'id' | 'covers'>>,
): LayerRecord {
  const { id = randomHex(16), covers = [id], ...rest } = about
  return { format: 1, id, form: 'tree', covers, createdAtMs: Date.now(), ...rest }
}

function realHome(path: HostPath): HostPath {
  try {
    return realPath(path)
  } catch (cause) {
    if (errnoOf(cause) === 'ENOENT' || errnoOf(cause) === 'ENOTDIR') throw new HomeMissingError(path)
    throw cause
  }
}

function openNewHome(path: HostPath): number {
  try {
    makeDirectory(AT_FDCWD, path, 0o700)
  } catch (cause) {
    if (errnoOf(cause) !== 'EEXIST') throw cause
  }
  const fd = openRoot(path, O_NOFOLLOW)
  try {
    if (!isOursAlone(fd)) throw new HomeUntrustedError(path)
    const names = namesIn(fd).filter((name) => name !== INIT_JSON && !name.startsWith('.new-'))
    if (!names.every((name) => (DIRECTORIES as readonly string[]).includes(name))) throw new HomeExistsError(path)
    if (names.length > 0 && tryStatAt(fd, INIT_JSON) === undefined) throw new HomeDamagedError(path)
    return fd
  } catch (error) {
    close(fd)
    throw error
  }
}

/** Numbers of the versions in a directory, ascending; with `claimed` also those that somebody is about to write. */
function numbersIn({ fd }: RecordPlace, claimed = false): number[] {
  const pattern = claimed ? /^([1-9]\d{0,14})\.(?:json|claim)$/ : VERSION_FILE
  return namesIn(fd)
    .flatMap((name) => Number(pattern.exec(name)?.[1] ?? []))
    .filter((number) => number > 0)
    .sort((left, right) => left - right)
}

function statBeneath(fd: number, directory: ByteString, name: ByteString): boolean {
  return withFd(openat(fd, directory, DIRECTORY_FLAGS), (inner) => tryStatAt(inner, name) !== undefined)
}

/** A rename that is durable: its target is before its source is. */
function move(fromFd: number, from: ByteString, toFd: number, to: ByteString): void {
  rename(fromFd, from, toFd, to)
  fsync(toFd, to)
  fsync(fromFd, from)
}

/** As `move`, for what several nodes move at once: only one of them finds it. */
function moveIfThere(fromFd: number, from: ByteString, toFd: number, to: ByteString): void {
  try {
    move(fromFd, from, toFd, to)
  } catch (cause) {
    if (errnoOf(cause) !== 'ENOENT') throw cause
  }
}

function trashedLayers(trash: RecordPlace): { name: ByteString; record: LayerRecord }[] {
  return namesIn(trash.fd).flatMap((name) => {
    if (!TRASHED_LAYER.test(name)) return []
    const fd = tryOpenDirectory(trash.fd, name)
    if (fd === undefined) return []
    const record = withFd(fd, () =>
      readRecord({ fd, path: `${trash.path}/${name}` as HostPath }, LAYER_JSON, LayerRecord),
    )
    return record === undefined ? [] : [{ name, record }]
  })
}
