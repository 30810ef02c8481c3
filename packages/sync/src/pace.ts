import { readFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'

export interface PaceLimits {
  readonly bytesPerSecond?: number
  readonly operationsPerSecond?: number
  /** Slows down while others wait for the disks. */
  readonly pressure?: PressureLimits
}

/** In percent of the last ten seconds in which some process waited for I/O. */
export interface PressureLimits {
  /** From here on, it backs off. */
  readonly highPercent: number
  /** Down here, it is at full speed again. Between the two it stays as it is. */
  readonly lowPercent: number
}

export const DEFAULT_PRESSURE: PressureLimits = { highPercent: 60, lowPercent: 30 }

/** Everything that a pace needs of the world, so that a test can have another one. */
export interface PaceEffects {
  /** Milliseconds that only grow. */
  now(): number
  /** @throws the signal's reason when it is aborted meanwhile */
  sleep(ms: number, signal: AbortSignal): Promise<void>
  /** The content of /proc/pressure/io; `undefined` where the kernel does not keep it. */
  readPressure(): string | undefined
}

export const systemPace: PaceEffects = {
  now: () => performance.now(),
  async sleep(ms, signal) {
    try {
      await delay(ms, undefined, { signal })
    } catch (error) {
      if (signal.aborted) throw signal.reason
      throw error
    }
  },
  readPressure() {
    try {
      return readFileSync('/proc/pressure/io', 'utf8')
    } catch {
      return undefined // a kernel without PSI, or with psi=0: nothing to go by
    }
  },
}

/**
 * How fast one target is fed. `take` before each delivery waits as long as the limits want: a rate is held on average,
 * with a burst of a quarter of a second's worth; one delivery may be larger than that, and later ones wait for it.
 *
 * Under I/O pressure each `take` waits besides, 50 ms at first and twice as long after each second in which the pressure
 * lasts, at most 2 s: it gets slow, but never stops, so that a busy machine cannot hold the target back for good.
 */
export class Pace {
  readonly #effects: PaceEffects
  readonly #bytes: Bucket | undefined
  readonly #operations: Bucket | undefined
  readonly #pressure: PressureLimits | undefined
  #sampledAt = Number.NEGATIVE_INFINITY
  #backOffMs = 0

  constructor({ bytesPerSecond, operationsPerSecond, pressure }: PaceLimits, effects: PaceEffects = systemPace) {
    this.#effects = effects
    const now = effects.now()
    this.#bytes = bytesPerSecond === undefined ? undefined : new Bucket(bytesPerSecond, now)
    this.#operations = operationsPerSecond === undefined ? undefined : new Bucket(operationsPerSecond, now)
    this.#pressure = pressure
  }

  /** A rate is to be held. */
  get isLimited(): boolean {
    return this.#bytes !== undefined || this.#operations !== undefined
  }

  /** How long each delivery waits now because others wait for the disks. */
  get backOffMs(): number {
    return this.#backOffMs
  }

  /**
   * Resolves when so much may be delivered; calls are let through in their order. What is urgent does not wait for the
   * pressure to pass, only for the limits.
   * @throws the signal's reason when it is aborted; what was asked for is then free for others
   */
  async take(bytes: number, operations: number, signal: AbortSignal, isUrgent = false): Promise<void> {
    signal.throwIfAborted()
    const now = this.#effects.now()
    this.#sample(now)
    const waitMs = Math.max(
      isUrgent ? 0 : this.#backOffMs,
      this.#bytes?.reserve(bytes, now) ?? 0,
      this.#operations?.reserve(operations, now) ?? 0,
    )
    if (waitMs <= 0) return
    try {
      await this.#effects.sleep(waitMs, signal)
    } catch (error) {
      this.#bytes?.giveBack(bytes)
      this.#operations?.giveBack(operations)
      throw error
    }
  }

  #sample(now: number): void {
    // The kernel brings its averages up to date every two seconds.
    if (this.#pressure === undefined || now - this.#sampledAt < SAMPLE_MS) return
    this.#sampledAt = now
    const percent = parsePressure(this.#effects.readPressure() ?? '')?.some.avg10Percent ?? 0
    if (percent >= this.#pressure.highPercent) {
      this.#backOffMs = Math.min(MOST_BACK_OFF_MS, Math.max(FIRST_BACK_OFF_MS, this.#backOffMs * 2))
    } else if (percent <= this.#pressure.lowPercent) this.#backOffMs = 0
  }
}

const SAMPLE_MS = 1000
const FIRST_BACK_OFF_MS = 50
const MOST_BACK_OFF_MS = 2000
const BURST_SECONDS = 0.25

/** A token bucket that may go into debt: who makes the debt waits until it is paid. */
class Bucket {
  readonly #perMs: number
  readonly #capacity: number
  #level: number
  #at: number

  constructor(perSecond: number, now: number) {
    this.#perMs = perSecond / 1000
    this.#capacity = perSecond * BURST_SECONDS
    this.#level = this.#capacity
    this.#at = now
  }

  /** Takes so much and gives the milliseconds until it is there. */
  reserve(amount: number, now: number): number {
    this.#level = Math.min(this.#capacity, this.#level + (now - this.#at) * this.#perMs)
    this.#at = now
    this.#level -= amount
    return this.#level >= 0 ? 0 : -this.#level / this.#perMs
  }

  giveBack(amount: number): void {
    this.#level += amount
  }
}

/** How much of the time tasks stood still: `some` of them, or all (`full`). */
export interface Pressure {
  readonly some: PressureAverages
  /** Absent in the first kernels that had PSI. */
  readonly full?: PressureAverages
}

export interface PressureAverages {
  readonly avg10Percent: number
  readonly avg60Percent: number
  readonly avg300Percent: number
}

/** Parses a file of /proc/pressure or a cgroup's io.pressure; `undefined` when it is none. Source: accounting/psi.rst. */
export function parsePressure(text: string): Pressure | undefined {
  const averages = (kind: string): PressureAverages | undefined => {
    const match = new RegExp(`^${kind} avg10=([0-9.]+) avg60=([0-9.]+) avg300=([0-9.]+) `, 'm').exec(text)
    if (match === null) return undefined
    const [, avg10Percent, avg60Percent, avg300Percent] = match.map(Number)
    return { avg10Percent, avg60Percent, avg300Percent } as PressureAverages
  }
  const [some, full] = [averages('some'), averages('full')]
  return some === undefined ? undefined : { some, ...(full === undefined ? {} : { full }) }
}
