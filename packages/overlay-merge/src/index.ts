export type { CloneMethod } from './clone.ts'
export * from './merge.ts'
export type { Namespace } from './model/marks.ts'
export * from './recover.ts'
