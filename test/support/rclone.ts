import { mkdirSync } from 'node:fs'
import { holdTestDirectory, testDirectory } from './image.ts'
import { startServer } from './server.ts'
import { type Shared, useShared } from './shared.ts'
import { isPresent, run } from './system.ts'

export const hasRclone = isPresent('rclone')

export interface RcloneOptions {
  readonly user?: string
  readonly password?: string
  /** With a certificate of its own. */
  readonly tls?: boolean
  readonly appendOnly?: boolean
}

/** `rclone serve restic` on a directory of the test's own. */
export interface Rclone {
  readonly port: number
  /** What it serves. */
  readonly directory: string
  /** Path of the certificate in PEM, with `tls`. */
  readonly certificate: string
  stop(): Promise<void>
}

let servers = 0

export async function startRclone(options: RcloneOptions = {}): Promise<Rclone> {
  const release = holdTestDirectory()
  const base = `${testDirectory()}/rclone${++servers}`
  const directory = `${base}/served`
  mkdirSync(directory, { recursive: true })
  const [certificate, key] = [`${base}/certificate.pem`, `${base}/key.pem`]
  if (options.tls === true) {
    const names = ['-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1']
    const curve = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1']
    run('openssl', 'req', '-x509', ...curve, '-nodes', '-days', '2', ...names, '-keyout', key, '-out', certificate)
  }
  const server = await startServer(base, 'rclone', (port) => [
    'rclone',
    ...['serve', 'restic', '--addr', `127.0.0.1:${port}`, '--config', `${base}/none`, '--cache-dir', `${base}/cache`],
    ...(options.tls === true ? ['--cert', certificate, '--key', key] : []),
    ...(options.user === undefined ? [] : ['--user', options.user, '--pass', options.password ?? '']),
    ...(options.appendOnly === true ? ['--append-only'] : []),
    directory,
  ])
  return {
    port: server.port,
    directory,
    certificate,
    async stop() {
      await server.stop()
      run('rm', '-rf', base)
      release()
    },
  }
}

/** One server for all tests of the surrounding `describe`. */
export function useRclone(options: RcloneOptions = {}): Shared<Rclone> {
  return useShared(
    'rclone',
    () => startRclone(options),
    (server) => server.stop(),
  )
}
