import { chmodSync } from 'node:fs'
import { createServer } from 'node:http'
import { LsyncError } from '@lsync/posix'
import type { RootStatus } from './status.ts'

/** Where metrics are read: only by this machine. */
export type MetricsAddress = { readonly path: string } | { readonly host: string; readonly port: number }

/** An address that others than this machine could reach, or none at all. */
export class MetricsAddressError extends LsyncError {
  constructor(text: string) {
    super('METRICS_ADDRESS', `metrics cannot be served on ${text}`, {
      hint: 'use unix:/PATH, 127.0.0.1:PORT or [::1]:PORT, and a proxy with a password for others',
    })
  }
}

/** `unix:/PATH`, `127.0.0.1:PORT`, `[::1]:PORT` or `localhost:PORT`. @throws {MetricsAddressError} */
export function parseMetricsAddress(text: string): MetricsAddress {
  const [, path] = /^unix:(\/.+)$/.exec(text) ?? []
  if (path !== undefined) return { path }
  const [, host, port] = /^(127\.0\.0\.1|\[::1\]|localhost):(\d{1,5})$/.exec(text) ?? []
  if (host === undefined || Number(port) > 65_535) throw new MetricsAddressError(text)
  return { host: host.replace(/[[\]]/g, ''), port: Number(port) }
}

interface Metric {
  readonly name: string
  readonly help: string
  of(status: RootStatus): readonly (readonly [labels: Readonly<Record<string, string>>, value: number])[]
}

const one = (value: number | boolean | undefined) => (value === undefined ? [] : ([[{}, Number(value)]] as const))

const METRICS: readonly Metric[] = [
  { name: 'mounted', help: 'Whether the root is mounted on this node.', of: ({ isMounted }) => one(isMounted) },
  {
    name: 'has_changes',
    help: 'Whether its upper has what is in no version.',
    of: ({ hasChanges }) => one(hasChanges),
  },
  { name: 'version', help: 'The version under its upper.', of: ({ version }) => one(version) },
  { name: 'newest_version', help: 'The newest version in its home.', of: ({ head }) => one(head) },
  { name: 'layers', help: 'How many layers a mount of it has.', of: ({ layers }) => one(layers?.length) },
  { name: 'lease_epoch', help: 'The epoch of the newest claim.', of: ({ lease }) => one(lease?.epoch) },
  {
    name: 'lease_is_ours',
    help: 'Whether this node may write it.',
    of: ({ lease }) => one(lease === undefined ? undefined : lease.isOurs && !lease.isReleased),
  },
  {
    name: 'sync_lag_seconds',
    help: 'How long the oldest change waits that is not durable on the target.',
    of: ({ sync }) => (sync?.targets ?? []).map(({ target, lagMs }) => [{ target }, lagMs / 1000] as const),
  },
  {
    name: 'sync_failures',
    help: 'Files that could not be carried over and are tried again.',
    of: ({ sync }) => (sync?.targets ?? []).map(({ target, failures }) => [{ target }, failures.length] as const),
  },
  {
    name: 'space_bytes',
    help: 'What it takes, where that was measured.',
    of: ({ space }) =>
      Object.entries(space ?? {}).map(([kind, bytes]) => [{ kind: kind.replace(/Bytes$/, '') }, bytes] as const),
  },
  { name: 'unknown', help: 'How many things could not be found out.', of: ({ errors }) => one(errors.length) },
  {
    name: 'last_error_timestamp_seconds',
    help: 'When an operation failed last.',
    of: ({ lastErrors: [last] }) => one(last === undefined ? undefined : last.atMs / 1000),
  },
]

/** What is known of roots, in the text format of Prometheus. */
export function metricsText(statuses: readonly RootStatus[]): string {
  return METRICS.map(({ name, help, of }) => {
    const lines = statuses.flatMap((status) =>
      of(status).map(
        ([labels, value]) => `lsync_root_${name}{${labelsOf({ root: status.name, ...labels })}} ${value}\n`,
      ),
    )
    return lines.length === 0
      ? ''
      : `# HELP lsync_root_${name} ${help}\n# TYPE lsync_root_${name} gauge\n${lines.join('')}`
  }).join('')
}

function labelsOf(labels: Readonly<Record<string, string>>): string {
  const quoted = (value: string) => value.replace(/[\\"]/g, '\\$&').replace(/\n/g, '\\n')
  return Object.entries(labels)
    .map(([name, value]) => `${name}="${quoted(value)}"`)
    .join(',')
}

/** Serves metrics until it is closed; `port` is the one that was given, for port 0. */
export async function serveMetrics(
  address: MetricsAddress,
  collect: () => Promise<readonly RootStatus[]>,
): Promise<{ readonly port: number | undefined; close(): Promise<void> }> {
  const server = createServer((request, response) => {
    if (request.method !== 'GET' || request.url !== '/metrics') {
      response.writeHead(404).end()
      return
    }
    collect().then(
      (statuses) => response.writeHead(200, { 'content-type': 'text/plain; version=0.0.4' }).end(metricsText(statuses)),
      (error: Error) => response.writeHead(500).end(`${error.message}\n`),
    )
  })
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    server.listen(address, resolve)
  })
  if ('path' in address) chmodSync(address.path, 0o600)
  const bound = server.address()
  return {
    port: typeof bound === 'object' && bound !== null ? bound.port : undefined,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve())
        server.closeAllConnections()
      }),
  }
}
