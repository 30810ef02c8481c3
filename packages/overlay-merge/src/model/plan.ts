import { type ByteString, bytesOf, textOf } from '@lsync/posix'
import type { Meta } from './entry.ts'
import type { EntryPath } from './path.ts'

/*
 * The plan: JSON lines, one record a line, the same bytes in the journal, in `lsync plan --json` and in `--dry-run
 * --json`. Paths are text in which a byte that is not UTF-8 is a lone surrogate U+DC80–U+DCFF (PEP 383); times are
 * decimal strings in ns; attribute values are base64. docs/format.md explains every field.
 */

/** What the target holds under a name before the step. */
export type Was = 'nothing' | 'file' | 'directory'

/** Metadata in JSON form. */
export interface PlannedMeta {
  mode: number
  uid: number
  gid: number
  atimeNs: string
  mtimeNs: string
  xattrs?: [name: string, base64: string][]
}

/** What an inode must still look like when a portable plan is applied elsewhere. */
export interface Expectation {
  type: number
  sizeBytes?: number
  mtimeNs?: string
}

interface StepBase {
  name: string
  was: Was
  /** Portable plans: the state of the target's name that the plan was made from. */
  expectTarget?: Expectation
}

/** The name shows nothing any more: what the target has there goes, and so does the upper's whiteout. */
export interface RemoveStep extends StepBase {
  do: 'remove'
}

/** The result is a layer and must go on hiding the name in what lies below it. */
export interface WhiteoutStep extends StepBase {
  do: 'whiteout'
}

/** The name becomes the object of an upper layer: renamed if that layer is consumed on the same file system, else copied. */
export interface PlaceStep extends StepBase {
  do: 'place'
  /** Index of the layer and path in it; by default layer 0 and this name in the record's `upper`. */
  from?: [layer: number, path: string]
  /** Where the bytes of a metacopy are, if not in `from`. */
  data?: [layer: number, path: string]
  /** It stays a metacopy: its data is in what lies below the result. */
  metacopy?: true
  /** A whole directory, moved with all that is in it. */
  tree?: true
  /** Attributes to take off before it shows, and to put on. */
  drop?: string[]
  set?: [name: string, base64: string][]
  /** Inode flags (chattr) that the view shows and that become real. */
  flags?: number
  /** Names with the same value are one inode in the result. */
  group?: string
  sizeBytes?: number
  expect?: Expectation
}

/** The name becomes a new directory; its own record gives what is in it. */
export interface MakeDirectoryStep extends StepBase {
  do: 'mkdir'
}

/** The name becomes an object that the target had under another path (`from`), or a metacopy's data with new metadata. */
export interface GraftStep extends StepBase {
  do: 'graft'
  from: string
  /** Files: the metadata that the upper gives it. Directories get theirs by their own record. */
  meta?: PlannedMeta
  drop?: string[]
  flags?: number
  group?: string
}

/** Index: the name becomes a link to the index inode `from` (a name in the workdir's index directory). */
export interface AliasStep extends StepBase {
  do: 'alias'
  from: string
  drop?: string[]
  flags?: number
  set?: [name: string, base64: string][]
  /** It stays a metacopy: its data is in what lies below the result. */
  metacopy?: true
}

export type Step = RemoveStep | WhiteoutStep | PlaceStep | MakeDirectoryStep | GraftStep | AliasStep

/** One directory of the result that changes. */
export interface DirectoryRecord {
  type: 'directory'
  path: string
  /** The directory of layer 0 that merges here, to be consumed. */
  upper?: string
  /** What the directory is given at last, when nothing in it changes any more. */
  meta: PlannedMeta
  /** The marks that it carries in a result that stays a layer. */
  opaque?: true
  redirect?: string
  flags?: number
  /** More records of the same directory follow; the one without this mark finishes it. */
  part?: true
  steps: Step[]
}

/** A directory inside the upper that is moved as a whole, cleaned where it is before that. */
export interface CleanRecord {
  type: 'clean'
  upper: string
  /** Whiteouts that hide nothing any more. */
  whiteouts?: string[]
  /** Names (`''` is the directory itself) and the attributes they lose. */
  drop?: [name: string, attributes: string[]][]
  flags?: [name: string, flags: number][]
  /** The directory's times, where dropping whiteouts changes them. */
  times?: [atimeNs: string, mtimeNs: string]
}

/** A source that must leave its place before anything else happens. */
export interface StageRecord {
  type: 'stage'
  id: number
  from: string
  to: string
  kind: 'directory' | 'file'
  /** fill: the upper's metacopy. */
  upper?: string
  /** fill: `upper` is a name of the index directory. */
  inIndex?: true
  /** move: renamed; copy: it shows elsewhere too; stay: it is already where it belongs; fill: data into the upper's inode. */
  how: 'move' | 'copy' | 'stay' | 'fill'
}

export interface PlanHeader {
  type: 'header'
  format: 1
  mode: MergeMode
  namespace: 'trusted' | 'user'
  upper: string
  lowers: string[]
  data: string[]
  /** Inode numbers of the upper's and the target's root, so that a recovery works on no other ones. */
  upperIno: string
  targetIno: string
  workdir?: string
  /** The tree that changes: the first lower in place, the new tree otherwise. */
  target: string
  /** The finished target's path, where the plan works on a tree that is published at the end. */
  publish?: string
  /** Whether layer 0 is used up. */
  consume: boolean
  /** Whether layer 0 and the target are one file system, so that consuming is renaming. */
  rename: boolean
  /** Whether something lies below the result, which therefore stays a layer. */
  below: boolean
  /** Whether escaped attributes get their plain names (the result is run as it is), or stay escaped (it is a layer). */
  plain: boolean
  portable: boolean
}

export interface PlanEnd {
  type: 'end'
  records: number
  /** xxHash64 of all lines before this one, newlines included, 16 hex digits. */
  digest: string
}

export type MergeMode = 'in-place' | 'output' | 'delta'

export type PlanRecord = DirectoryRecord | CleanRecord | StageRecord

/** Metadata into its JSON form. */
export function plannedMeta(meta: Meta): PlannedMeta {
  const planned: PlannedMeta = {
    mode: meta.mode,
    uid: meta.uid,
    gid: meta.gid,
    atimeNs: String(meta.atimeNs),
    mtimeNs: String(meta.mtimeNs),
  }
  if (meta.xattrs.length > 0) {
    planned.xattrs = meta.xattrs.map(({ name, value }) => [textOf(name), Buffer.from(value).toString('base64')])
  }
  return planned
}

/** And back. */
export function metaFrom(planned: PlannedMeta): Meta {
  return {
    mode: planned.mode,
    uid: planned.uid,
    gid: planned.gid,
    atimeNs: BigInt(planned.atimeNs),
    mtimeNs: BigInt(planned.mtimeNs),
    xattrs: (planned.xattrs ?? []).map(([name, value]) => ({
      name: bytesOf(name),
      value: Buffer.from(value, 'base64'),
    })),
  }
}

/** A path of the plan as bytes. */
export function planPath(text: string): EntryPath {
  return bytesOf(text) as string as EntryPath
}

/** An attribute of the plan as bytes. */
export function planName(text: string): ByteString {
  return bytesOf(text)
}
