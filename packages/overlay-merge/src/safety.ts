import type { HostPath } from '@lsync/posix'
import type { MergeRequest } from './merge.ts'
import type { OpenStack } from './stack.ts'

export function assertMergeable(_what: { request: MergeRequest; stack: OpenStack; target: HostPath }): void {}
