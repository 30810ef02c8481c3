export {
  type Connection,
  ConnectionLostError,
  ProtocolError,
  type RemoteAddress,
  SshConnections,
  type SshOptions,
} from '@lsync/ssh'
export { Applier, type ApplierOptions, type ContentOperation, type FileWriter, type PlainOperation } from './applier.ts'
export {
  askSync,
  type ControlAnswers,
  ControlSocket,
  type ControlVerb,
  readableStatus,
  SyncNotRunningError,
  SyncRunningError,
} from './control-socket.ts'
export type { Difference, Differences, NameKind } from './differences.ts'
export { PatternInvalidError } from './filter.ts'
export { LineConnection, LineSocket } from './line-socket.ts'
export type { Checkpoint } from './model/checkpoint.ts'
export type { EntryKind, Extent, Failure, Operation, RawMeta, TreePath } from './model/operation.ts'
export { type PreviewedChange, previewSync } from './preview.ts'
export { OperationTooBigError, ProtocolVersionError } from './protocol/errors.ts'
export {
  limitExtents,
  MAX_CONTENT_BYTES,
  OperationDecoder,
  OperationEncoder,
  type OperationReceiver,
} from './protocol/operation-codec.ts'
export { AccessRefusedError, ServedPathError } from './serve/errors.ts'
export { type ServeReport, type ServeRequest, serve } from './serve/server.ts'
export { openSource } from './source/choose.ts'
export { SourceUnavailableError, WatchLimitError } from './source/errors.ts'
export type { BlindSpot, DirectoryRef, Hint, Source, SourceRequest } from './source/source.ts'
export {
  defaultStateDir,
  type FlushOptions,
  type FlushReport,
  openSync,
  type Sync,
  type SyncRequest,
  SyncRequestError,
  type SyncStatus,
  SyncStoppedError,
} from './sync.ts'
export { OperationRefusedError } from './target-path.ts'
export { type PendingFailure, TargetNotOursError, type TargetStatus } from './target-session.ts'
export { TargetGoneError, TargetPlace, TargetStateDamagedError } from './target-state.ts'
export {
  formatTarget,
  parseTarget,
  type TargetAddress,
  TargetAddressError,
} from './transport/address.ts'
export { LocalTarget } from './transport/local.ts'
export { type RemoteOptions, remoteTarget } from './transport/open-target.ts'
export { RemoteTarget, type RemoteTargetRequest } from './transport/remote.ts'
export { SftpTarget, type SftpTargetRequest } from './transport/sftp.ts'
export type { Target, TargetLoss, TargetState } from './transport/target.ts'
