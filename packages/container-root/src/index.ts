export type { BackupReport } from './backup.ts'
export * from './cgroup.ts'
export { type CompactPolicy, type CompactReport, compact } from './compact.ts'
export {
  ContainerRoot,
  leasesOf,
  type MountRequest,
  type OpenOptions,
  type RollbackRequest,
} from './container-root.ts'
export { leaseNameOf, type PrefetchReport, type RootEvents, UnsavedChangesError, UpperStaleError } from './context.ts'
export { type ConvertReport, type ConvertRequest, StoreHoldsNoTreesError } from './convert.ts'
export { EtcdLeases, type EtcdLeasesOptions } from './etcd-lease.ts'
export { FileLeases, type FileLeasesOptions } from './file-lease.ts'
export type { ForkRequest } from './fork.ts'
export { collectGarbage, type GcPolicy, type GcReport } from './gc.ts'
export * from './home.ts'
export * from './hooks.ts'
export * from './init.ts'
export { type Changed, type LastDelta, type Prediction, predict, ratesOf, type StoreRates } from './last-delta.ts'
export * from './layer-cache.ts'
export { chooseLayers } from './layer-choice.ts'
export {
  Lease,
  LeaseClaim,
  LeaseDamagedError,
  LeaseHeldError,
  type LeaseKeeper,
  LeaseLostError,
  type LeaseRequest,
  type LeaseState,
  type Leases,
  LeaseUnreachableError,
  StoreWentBackError,
  type TakeoverRequest,
} from './lease.ts'
export { type LiveUser, liveUsers } from './live-users.ts'
export * from './metrics.ts'
export * from './node-state.ts'
export * from './policies.ts'
export * from './quiescence.ts'
export {
  CacheRecord,
  ErrorsRecord,
  LayerRecord,
  LeaseKeeping,
  MountedRecord,
  NodeRecord,
  NodeRootRecord,
  RecordDamagedError,
  RecordNewerError,
  RootRecord,
  SolidifyRecord,
  VersionRecord,
} from './records.ts'
export * from './repository-target.ts'
export * from './root-hooks.ts'
export {
  LayerDamagedError,
  mountSealed,
  SealFailedError,
  SealLossyError,
  type SealReport,
  type SealRequest,
  SealToolMissingError,
  sealLayer,
  unsealLayer,
} from './sealed-layer.ts'
export {
  type SealedDelta,
  SolidifyIncompleteError,
  type SolidifyReport,
  type SolidifyRequest,
} from './solidify.ts'
export type { RootSpace } from './space.ts'
export { type HomeStatus, type LayerStatus, type RootStatus, statusOfHome } from './status.ts'
export * from './store-form.ts'
export * from './switch.ts'
export * from './switch-errors.ts'
export * from './switch-peer.ts'
export { readSwitch, type SwitchEnd, type SwitchPhase, type SwitchPlan, SwitchRecord } from './switch-record.ts'
export {
  type HookOutcome,
  type PreCopyRound,
  type Settlement,
  type SideCheck,
  type StopReport,
  SwitchSide,
} from './switch-side.ts'
export { diffVersions, type VersionDifference } from './version-diff.ts'
