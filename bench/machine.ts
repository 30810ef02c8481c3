import { readFileSync } from 'node:fs'
import { cpus, release, totalmem } from 'node:os'

/** What the figures of a run depend on besides the programs. */
export type Machine = {
  cpu: string
  cores: number
  memoryGiB: number
  kernel: string
  distribution: string
  node: string
  /** Runnable processes averaged over the last minute, when the run began: other work makes figures noisy. */
  loadAtStart: number
}

/** Describes the machine that this runs on. */
export function describeMachine(): Machine {
  const read = (path: string): string => {
    try {
      return readFileSync(path, 'utf8')
    } catch {
      return ''
    }
  }
  return {
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    cores: cpus().length,
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    kernel: release(),
    distribution: /^PRETTY_NAME="?(.*?)"?$/m.exec(read('/etc/os-release'))?.[1] ?? 'unknown',
    node: process.version,
    loadAtStart: Number(read('/proc/loadavg').split(' ')[0] ?? 0),
  }
}
