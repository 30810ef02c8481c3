import { PassThrough } from 'node:stream'
import type { ByteString, HostPath } from '@lsync/posix'
import {
  type Connection,
  type Failure,
  type Operation,
  OperationEncoder,
  type RawMeta,
  RemoteTarget,
  type ServeRequest,
  serve,
  type TreePath,
} from '@lsync/sync'

export const path = (text: string) => text as TreePath

export function meta(more: Partial<RawMeta> = {}): RawMeta {
  return { mode: 0o644, uid: 0, gid: 0, mtimeNs: 1_000_000_000n, xattrs: [], inodeFlags: 0, ...more }
}

export function fileOf(name: string, content: string, more: Partial<RawMeta> = {}): readonly [Operation, string] {
  const extents = content === '' ? [] : ([[0, content.length]] as const)
  return [{ do: 'file', path: path(name), meta: meta(more), sizeBytes: content.length, extents }, content]
}

/** One batch of operations; a pair is one with its content. */
export function batchOf(...operations: readonly (Operation | readonly [Operation, string])[]): Uint8Array {
  const encoder = new OperationEncoder()
  for (const item of operations) {
    const [operation, content] = 'do' in item ? [item, undefined] : item
    encoder.operation(operation)
    if (content === undefined) continue
    encoder.content(Buffer.from(content, 'latin1'))
    encoder.finish()
  }
  return encoder.take()
}

export const codesOf = (failures: readonly Failure[]) => failures.map(({ index, code }) => [index, code])

/** A server in this process, and the client's end of the line to it. `ended` tells how it came to its end. */
export function serveHere(request: Omit<ServeRequest, 'input' | 'output'>) {
  const [toServer, toClient] = [new PassThrough(), new PassThrough()]
  const report = serve({ ...request, input: toServer, output: toClient })
  const ended = report.then(
    () => undefined,
    (error: unknown) => error,
  )
  void ended.then(() => toClient.end())
  const connection: Connection = {
    readable: toClient,
    writable: toServer,
    explain: async () => undefined,
    destroy: () => {
      toServer.destroy()
      toClient.destroy()
    },
  }
  return { connection, report, ended, toServer, toClient }
}

/** A target behind a server in this process. */
export function targetHere(
  root: string,
  target: string,
  more: Partial<ServeRequest> = {},
  timeoutMs = 20_000,
  compress: boolean | 'auto' = 'auto',
) {
  const servers: ReturnType<typeof serveHere>[] = []
  const remote = new RemoteTarget({
    description: 'here',
    path: target as ByteString,
    connect: async () => {
      const server = serveHere({ root: root as HostPath, access: 'full', ...more })
      servers.push(server)
      return server.connection
    },
    compress,
    timeoutMs,
    answerTimeoutMs: 60_000,
  })
  return { remote, servers }
}

export const never = new AbortController().signal
