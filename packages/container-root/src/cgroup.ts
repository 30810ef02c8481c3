import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { errnoOf, LsyncError, readMountInfo } from '@lsync/posix'

/** The processes of a cgroup could not be frozen. */
export class FreezeFailedError extends LsyncError {
  constructor(cgroup: string, why: string, cause?: unknown) {
    super('FREEZE_FAILED', `the cgroup ${cgroup} cannot be frozen: ${why}`, {
      path: cgroup,
      hint: 'name the cgroup of the container (cgroup v2, or the freezer of v1), or stop the container instead',
      cause,
    })
  }
}

const FREEZE_MS = 10_000
const LOOK_MS = 5

/**
 * Freezes every process of a cgroup, those below it included, and resolves when all stand still; the function that comes back thaws
 * them. `cgroup` is a directory of cgroup v2, or of the freezer of v1.
 * @throws {FreezeFailedError} when it is none, holds this very process, or does not stand still within 10 s; it is thawed then
 */
export async function freezeCgroup(cgroup: string, signal?: AbortSignal): Promise<() => void> {
  const knob = knobOf(cgroup)
  if (cgroupsOf(process.pid).some((own) => own === cgroup || own.startsWith(`${cgroup}/`))) {
    throw new FreezeFailedError(cgroup, 'this process is in it')
  }
  const thaw = () => writeFileSync(knob.file, knob.thaw)
  try {
    writeFileSync(knob.file, knob.freeze)
    const endMs = performance.now() + FREEZE_MS
    while (!knob.isFrozen()) {
      if (performance.now() > endMs) throw new FreezeFailedError(cgroup, 'its processes do not stand still')
      await delay(LOOK_MS, undefined, { ...(signal && { signal }) })
    }
    return thaw
  } catch (cause) {
    thawCgroup(cgroup)
    if (errnoOf(cause) === undefined) throw cause
    throw new FreezeFailedError(cgroup, (cause as Error).message, cause)
  }
}

/** Thaws a cgroup, frozen by whomever. One that is gone is fine. */
export function thawCgroup(cgroup: string): void {
  if (!existsSync(cgroup)) return
  const knob = knobOf(cgroup)
  writeFileSync(knob.file, knob.thaw)
}

interface Knob {
  readonly file: string
  readonly freeze: string
  readonly thaw: string
  isFrozen(): boolean
}

// Source: the kernel's cgroup-v2.rst ("cgroup.freeze") and cgroup-v1/freezer-subsystem.rst.
function knobOf(cgroup: string): Knob {
  const [second, first] = [`${cgroup}/cgroup.freeze`, `${cgroup}/freezer.state`]
  if (existsSync(second)) {
    const isFrozen = () => /^frozen 1$/m.test(readFileSync(`${cgroup}/cgroup.events`, 'utf8'))
    return { file: second, freeze: '1', thaw: '0', isFrozen }
  }
  if (existsSync(first)) {
    const isFrozen = () => readFileSync(first, 'utf8').trim() === 'FROZEN'
    return { file: first, freeze: 'FROZEN', thaw: 'THAWED', isFrozen }
  }
  throw new FreezeFailedError(cgroup, 'it is no cgroup that can be')
}

/** The cgroups of a process that can be frozen, as directories: of the freezer (v1) and of v2. */
export function cgroupsOf(pid: number): string[] {
  const mounts = readMountInfo()
  return readFileSync(`/proc/${pid}/cgroup`, 'utf8')
    .split('\n')
    .flatMap((line) => {
      const [, controllers, path] = /^\d+:([^:]*):(.*)$/.exec(line) ?? []
      if (path === undefined || (controllers !== '' && controllers !== 'freezer')) return []
      const mount = mounts.find(({ type, superOptions }) =>
        controllers === ''
          ? type === 'cgroup2'
          : type === 'cgroup' && superOptions.some(({ name }) => name === 'freezer'),
      )
      return mount === undefined ? [] : [path === '/' ? mount.target : `${mount.target}${path}`]
    })
}
