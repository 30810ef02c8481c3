export * from './backend/backend.ts'
export { type CacheOptions, CachingBackend, defaultCacheDirectory } from './backend/cache.ts'
export * from './backend/errors.ts'
export { LocalBackend } from './backend/local.ts'
export { type BackendOptions, localPathIn, openBackend } from './backend/open.ts'
export { RestBackend, type RestOptions } from './backend/rest.ts'
export type { RemoteOptions, RetryEvent } from './backend/retries.ts'
export { S3Backend, type S3Options } from './backend/s3.ts'
export { SftpBackend, type SftpOptions } from './backend/sftp.ts'
export * from './check.ts'
export * from './copy.ts'
export {
  CreateInvalidError,
  type CreateReport,
  type CreateRequest,
  createSnapshot,
  type SnapshotTarget,
  SourceUnreadableError,
} from './create.ts'
export * from './create-tar.ts'
export { diffSnapshots, type SnapshotChange } from './diff.ts'
export * from './forget.ts'
export * from './inspect.ts'
export { type KeyInfo, KeyInvalidError, type PasswordCost, PasswordWrongError } from './key-file.ts'
export type { SnapshotForm } from './layer-items.ts'
export * from './lock.ts'
export type { SourceChange } from './model/changes.ts'
export type { NodeType } from './model/mode.ts'
export {
  type Duration,
  type GroupKey,
  groupSnapshots,
  type KeepRules,
  parseDuration,
  type Verdict,
} from './model/retention.ts'
export type { Snapshot } from './model/snapshot.ts'
export type { ObjectId, TreeNode, Xattr } from './model/tree.ts'
export * from './oci/errors.ts'
export * from './oci/export.ts'
export * from './oci/export-snapshot.ts'
export type { Descriptor, ImageConfig, Manifest, Platform } from './oci/image.ts'
export * from './oci/import.ts'
export { type Image, type ImageChoice, ImageLayout } from './oci/layout.ts'
export type { ThreadUse } from './prepared-threads.ts'
export { type PruneReport, type PruneRequest, pruneRepository } from './prune.ts'
export * from './repair.ts'
export * from './repair-snapshots.ts'
export * from './repository.ts'
export { type RestoreReport, type RestoreRequest, restoreSnapshot } from './restore.ts'
export * from './restore-as.ts'
export type { RestoreAction, RestoreProblem } from './restore-files.ts'
export type { SaveCounts, SaveProblem } from './save.ts'
export * from './select.ts'
export * from './snapshot-editor.ts'
export * from './source/source.ts'
export * from './tag.ts'
export type { ShownNode } from './walk.ts'
