import { existsSync, mkdirSync, writeFileSync } from 'node:fs'
import { holdTestDirectory, testDirectory } from './image.ts'
import { type RunningServer, startServer } from './server.ts'
import { type Shared, useShared } from './shared.ts'
import { isPresent, run } from './system.ts'

const SERVERS = ['account', 'container', 'object'] as const

/** Whether OpenStack Swift is installed, which speaks S3. */
export const hasSwift =
  existsSync('/etc/swift/swift.conf') &&
  ['memcached', 'swift-proxy-server', ...SERVERS.map((name) => `swift-${name}-server`)].every(isPresent)

/** An S3 server of the test's own. */
export interface Swift {
  readonly port: number
  readonly accessKey: string
  readonly secretKey: string
  /** Hosts of the form BUCKET.DOMAIN name buckets. */
  readonly domain: string
  stop(): Promise<void>
}

// What nine calls of swift-ring-builder would do, each of which takes half a second of Python.
const MAKE_RINGS = `
import sys
from swift.common.ring import RingBuilder
for name, port in (word.split(':') for word in sys.argv[2:]):
    builder = RingBuilder(6, 1, 1)
    builder.add_dev({'region': 1, 'zone': 1, 'ip': '127.0.0.1', 'port': int(port), 'device': 'd1', 'weight': 1})
    builder.rebalance()
    builder.get_ring().save('%s/%s.ring.gz' % (sys.argv[1], name))
`
const DOMAIN = 's3.test'

export async function startSwift(): Promise<Swift> {
  const release = holdTestDirectory()
  const base = `${testDirectory()}/swift`
  mkdirSync(`${base}/devices/d1`, { recursive: true })
  const running: RunningServer[] = []
  const launch = async (name: string, program: string, configFor: (port: number) => readonly string[]) => {
    const server = await startServer(base, name, (port) => {
      writeFileSync(`${base}/${name}.conf`, `${configFor(port).join('\n')}\n`)
      return [program, `${base}/${name}.conf`]
    })
    running.push(server)
    return server.port
  }
  const common = (port: number) => [
    ...['[DEFAULT]', 'bind_ip = 127.0.0.1', `bind_port = ${port}`, `swift_dir = ${base}`, 'user = root', 'workers = 0'],
    ...[`devices = ${base}/devices`, 'mount_check = false', `log_file = ${base}/syslog`],
  ]
  const memcached = startServer(base, 'memcached', (port) => [
    ...(['memcached', '-l', '127.0.0.1', '-p', String(port), '-u', 'root', '-m', '16', '-P'] as const),
    `${base}/memcached.pid`,
  ]).then((server) => {
    running.push(server)
    return server.port
  })
  const storages = SERVERS.map(async (name) => {
    const port = await launch(name, `swift-${name}-server`, (port) => [
      ...common(port),
      ...['[pipeline:main]', `pipeline = ${name}-server`, `[app:${name}-server]`, `use = egg:swift#${name}`],
    ])
    return `${name}:${port}`
  })
  const [memcachedPort, ...ports] = await Promise.all([memcached, ...storages])
  run('/usr/bin/python3', '-c', MAKE_RINGS, base, ...ports)
  const port = await launch('proxy', 'swift-proxy-server', (port) => [
    ...common(port),
    '[pipeline:main]',
    'pipeline = catch_errors proxy-logging cache s3api tempauth copy slo dlo proxy-logging proxy-server',
    ...['[app:proxy-server]', 'use = egg:swift#proxy', 'account_autocreate = true'],
    ...['[filter:tempauth]', 'use = egg:swift#tempauth', 'user_test_tester = testing .admin'],
    ...['[filter:s3api]', 'use = egg:swift#s3api', `storage_domain = ${DOMAIN}`],
    ...['[filter:cache]', 'use = egg:swift#memcache', `memcache_servers = 127.0.0.1:${memcachedPort}`],
    ...['catch_errors', 'copy', 'slo', 'dlo'].flatMap((name) => [`[filter:${name}]`, `use = egg:swift#${name}`]),
    ...['[filter:proxy-logging]', 'use = egg:swift#proxy_logging'],
  ])
  return {
    port,
    accessKey: 'test:tester',
    secretKey: 'testing',
    domain: DOMAIN,
    async stop() {
      await Promise.all(running.map((server) => server.stop()))
      run('rm', '-rf', base)
      release()
    },
  }
}

/** One S3 server for all tests of the surrounding `describe`, whose keys are in the environment meanwhile. */
export function useSwift(): Shared<Swift> {
  const start = async () => {
    const server = await startSwift()
    process.env['AWS_ACCESS_KEY_ID'] = server.accessKey
    process.env['AWS_SECRET_ACCESS_KEY'] = server.secretKey
    return server
  }
  const stop = (server: Swift) => {
    delete process.env['AWS_ACCESS_KEY_ID']
    delete process.env['AWS_SECRET_ACCESS_KEY']
    return server.stop()
  }
  return useShared('the S3 server', start, stop, 120_000)
}
