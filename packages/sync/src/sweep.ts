import { setTimeout as delay } from 'node:timers/promises'

export interface SweepRequest {
  /** How long one sweep of all directories takes. */
  readonly periodMs: number
  /** At most so many directories in a second, however large the tree is; the sweep then takes longer. */
  readonly directoriesPerSecond: number
}

/** What is swept, by directory ids, which are positive and stay the same. */
export interface SweptTree {
  /** How many directories there are, about. */
  count(): number
  /** The next ids after one, ascending, at most so many; none at the end. */
  after(id: number, most: number): readonly number[]
  /**
   * Compares the names of these directories with what is known, by a stat of each and without reading content, and marks
   * what differs.
   */
  look(ids: readonly number[]): Promise<void>
}

export interface SweepEffects {
  /** Milliseconds that only grow. */
  now(): number
  /** @throws the signal's reason when it is aborted meanwhile */
  sleep(ms: number, signal: AbortSignal): Promise<void>
}

export const systemSweep: SweepEffects = {
  now: () => performance.now(),
  async sleep(ms, signal) {
    try {
      // It must not keep a process alive that is otherwise done.
      await delay(ms, undefined, { signal, ref: false })
    } catch (error) {
      if (signal.aborted) throw signal.reason
      throw error
    }
  },
}

// A process that wakes for one directory at a time keeps the processor from its deeper sleep.
const SHORTEST_REST_MS = 1000

/**
 * The net under all sources: a slow walk, from one directory to the next and round again, that finds what no hint has
 * told of. It spreads over its period, so that at rest it costs a few stats in each second. It begins anew with each start,
 * since a start compares everything anyway.
 */
export class Sweep {
  readonly #request: SweepRequest
  readonly #tree: SweptTree
  readonly #effects: SweepEffects
  #cursor = 0
  #rounds = 0

  constructor(request: SweepRequest, tree: SweptTree, effects: SweepEffects = systemSweep) {
    this.#request = request
    this.#tree = tree
    this.#effects = effects
  }

  /** Sweeps that have come to their end. */
  get rounds(): number {
    return this.#rounds
  }

  /** Sweeps until the signal is aborted, then resolves. What `look` throws ends it. */
  async run(signal: AbortSignal): Promise<void> {
    let owed = 0
    let since = this.#effects.now()
    while (!signal.aborted) {
      try {
        await this.#effects.sleep(this.#restMs(owed), signal)
      } catch (error) {
        if (signal.aborted) return
        throw error
      }
      const now = this.#effects.now()
      // Of a long standstill, no more than one rest is made up for: the machine has just come back.
      owed += Math.min((now - since) * this.#perMs(), Math.max(1, this.#perMs() * SHORTEST_REST_MS))
      since = now
      const most = Math.floor(owed)
      if (most < 1) continue
      let ids = this.#tree.after(this.#cursor, most)
      if (ids.length === 0 && this.#cursor > 0) {
        this.#endRound()
        ids = this.#tree.after(0, most)
      }
      // What is left over at the end of a round is not owed to the next.
      owed = ids.length < most ? 0 : owed - most
      if (ids.length === 0) continue
      await this.#tree.look(ids)
      this.#cursor = ids[ids.length - 1] as number
    }
  }

  #perMs(): number {
    const { periodMs, directoriesPerSecond } = this.#request
    return Math.min(directoriesPerSecond / 1000, Math.max(1, this.#tree.count()) / periodMs)
  }

  /** Until there is a whole directory to look at. */
  #restMs(owed: number): number {
    return Math.max(SHORTEST_REST_MS, Math.ceil((1 - owed) / this.#perMs()))
  }

  #endRound(): void {
    this.#cursor = 0
    this.#rounds += 1
  }
}
