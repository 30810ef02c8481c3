import { existsSync, mkdirSync } from 'node:fs'
import { holdTestDirectory, testDirectory } from './image.ts'
import { type RunningServer, startServer } from './server.ts'
import { type Shared, useShared } from './shared.ts'
import { freePort } from './sshd.ts'
import { isPresent } from './system.ts'

/** Whether etcd's server is installed. */
export const hasEtcd = isPresent('etcd')

/** An etcd of the test's own, one member on loopback, its data in RAM. */
export interface Etcd {
  readonly endpoint: string
  /** Stops it; its data stays. */
  stop(): Promise<void>
  /** Starts it again with its data, on the same port. */
  start(): Promise<void>
}

let servers = 0

/** One etcd for all tests of the surrounding `describe` (or file). */
export function useEtcd(): Shared<Etcd> {
  let release: (() => void) | undefined
  const start = async (): Promise<Etcd> => {
    release = holdTestDirectory()
    const base = `${testDirectory()}/etcd${++servers}`
    if (!existsSync(base)) mkdirSync(base, { mode: 0o700 })
    const peer = `http://127.0.0.1:${await freePort()}`
    const command = (port: number): [string, ...string[]] => [
      'etcd',
      ...['--data-dir', `${base}/data`, '--name', 'one', '--logger', 'zap', '--log-level', 'warn'],
      ...['--listen-client-urls', `http://127.0.0.1:${port}`, '--advertise-client-urls', `http://127.0.0.1:${port}`],
      ...['--listen-peer-urls', peer, '--initial-advertise-peer-urls', peer, '--initial-cluster', `one=${peer}`],
    ]
    let server: RunningServer = await startServer(base, 'etcd', command)
    const { port } = server
    return {
      endpoint: `http://127.0.0.1:${port}`,
      stop: () => server.stop(),
      start: async () => {
        server = await startServer(base, 'etcd', () => command(port), port)
      },
    }
  }
  const stop = async (etcd: Etcd) => {
    await etcd.stop()
    release?.()
  }
  return useShared('etcd', start, stop)
}
