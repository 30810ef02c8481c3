// A node in a process of its own that wants a lease: says on its standard output, one JSON object a line, what came of each
// command that it reads from its standard input.
import { createInterface } from 'node:readline'
import { EtcdLeases, FileLeases, type Lease, type Leases } from '@lsync/container-root'

const [node = '', where = '', durationMs = '', skewMs = '0'] = process.argv.slice(2)
const now = Date.now
Date.now = () => now() + Number(skewMs)

const options = { durationMs: Number(durationMs) }
const leases: Leases = where.startsWith('http')
  ? new EtcdLeases({
      ...options,
      endpoints: [where.slice(0, where.lastIndexOf('/'))],
      root: where.slice(where.lastIndexOf('/') + 1),
    })
  : new FileLeases(where, options)
let lease: Lease | undefined

const answers: Readonly<Record<string, () => Promise<unknown>>> = {
  async acquire() {
    lease = await leases.acquire({ node })
    lease.keepAlive()
    return lease.claim
  },
  async takeover() {
    lease = await leases.takeover({ node })
    lease.keepAlive()
    return lease.claim
  },
  check: async () => lease?.check(),
  release: async () => lease?.release(),
}
for await (const command of createInterface({ input: process.stdin })) {
  try {
    console.log(JSON.stringify({ done: command, result: await answers[command]?.() }))
  } catch (error) {
    const { code, message } = error as { code?: string; message: string }
    console.log(JSON.stringify({ done: command, code: code ?? 'BUG', message }))
  }
}
