export type { Checkpoint } from './model/checkpoint.ts'
export type { EntryKind, Extent, Failure, Operation, RawMeta, TreePath } from './model/operation.ts'
export type { BlindSpot, DirectoryRef, Hint, Source, SourceRequest } from './source/source.ts'
export type { Target, TargetLoss, TargetState } from './transport/target.ts'
