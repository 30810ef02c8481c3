export * from './check.ts'
export type { CloneMethod } from './clone.ts'
export { type CloneLayerRequest, cloneLayer } from './clone-layer.ts'
export { type Comparison, compareTrees, OpenTree, ResolvedTree, type TreeDifference } from './compare.ts'
export { compareStacks } from './compare-stacks.ts'
export * from './deref.ts'
export * from './diff.ts'
export {
  clearProtection,
  despiteProtection,
  moveOver,
  PROTECTION,
  removeTree,
  type Trash,
  takeAway,
  withoutProtection,
} from './effects.ts'
export { decompress } from './encodings/compression.ts'
export {
  type ConvertProgress,
  type ConvertReport,
  convertLayer,
  exportLayer,
  importLayer,
  isArchiveForm,
  type LayerForm,
  type LayerReader,
} from './encodings/convert.ts'
export { LayerEntryRefusedError, LimitExceededError } from './encodings/errors.ts'
export {
  ACL_ACCESS,
  ACL_DEFAULT,
  type InodeKind,
  inheritsAcls,
  NotAFileError,
  openDirectory,
  openNew,
  openRegular,
  readXattrs,
  type WriteMetaOptions,
  writeMeta,
} from './encodings/inode.ts'
export type { LayerItem } from './encodings/item.ts'
export { decodeKernelInode, marksOf, plainEntry, type RawInode } from './encodings/kernel.ts'
export type { EntryPolicy } from './encodings/policy.ts'
export { dataName } from './encodings/portable.ts'
export {
  PORTABLE_MANIFEST,
  type PortableInode,
  type PortableName,
  readPortableTree,
  writeManifest,
} from './encodings/portable-tree.ts'
export { DirectorySpool, piecesOf, type Spool } from './encodings/spool.ts'
export { readTarLayer, type TarReadOptions } from './encodings/tar.ts'
export { TargetBusyError } from './journal.ts'
export * from './merge.ts'
export type { Entry, Meta, Xattr } from './model/entry.ts'
export { isMark, MARKS, type MarkNames, type Namespace } from './model/marks.ts'
export type { EntryPath } from './model/path.ts'
export type { PlanEnd, PlanHeader, PlanRecord, Step } from './model/plan.ts'
export * from './portable-plan.ts'
export * from './problems.ts'
export { OutputExistsError } from './problems.ts'
export * from './recover.ts'
export { closeStack, openStack, type StackRequest, stackFrom, stackInit } from './stack.ts'
export type { Dropped, VacuumReport, VacuumRequest } from './vacuum.ts'
export { recoverVacuum, vacuum } from './vacuum.ts'
export * from './verify.ts'
export * from './verify-in-place.ts'
export type { ShownInode } from './view.ts'
export type { StackInit } from './work.ts'
