import { appendFileSync, readFileSync } from 'node:fs'
import { connect } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { testDirectory } from './image.ts'
import { freePort } from './sshd.ts'
import { start } from './system.ts'

/** A server process that listens on loopback. */
export interface RunningServer {
  readonly port: number
  stop(): Promise<void>
}

/**
 * Starts a server on a free port (or on `wantedPort`) and waits until it takes connections. Its log is `base/name.log`. The caller stops it;
 * a killed test run is cleared away by the next one.
 */
export async function startServer(
  base: string,
  name: string,
  commandFor: (port: number) => readonly [string, ...string[]],
  wantedPort?: number,
): Promise<RunningServer> {
  // Another process can take the port between its finding and the server: then the next one.
  for (let attempt = 0; ; attempt++) {
    const port = wantedPort ?? (await freePort())
    const [command, ...args] = commandFor(port)
    const child = start(`${base}/${name}.log`, command, ...args)
    appendFileSync(`${testDirectory()}/stop.sh`, `grep -qs ${base} /proc/${child.pid}/cmdline && kill ${child.pid}\n`)
    const ended = new Promise((resolve) => child.once('exit', resolve))
    const isUp = await untilUp(port, () => child.exitCode === null && child.signalCode === null)
    if (isUp) {
      return {
        port,
        async stop() {
          child.kill('SIGTERM')
          await ended
        },
      }
    }
    child.kill('SIGKILL')
    await ended
    if (attempt >= 5) throw new Error(`${name} does not start: ${readFileSync(`${base}/${name}.log`, 'utf8')}`)
  }
}

async function untilUp(port: number, isAlive: () => boolean): Promise<boolean> {
  for (let attempt = 0; attempt < 600 && isAlive(); attempt++) {
    if (await canConnect(port)) return isAlive()
    await delay(50)
  }
  return false
}

function canConnect(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1')
    socket.once('error', () => resolve(false))
    socket.once('connect', () => {
      socket.destroy()
      resolve(true)
    })
  })
}
