import { describe, expect, test } from 'vitest'
import { Sweep, type SweepEffects, type SweepRequest, type SweptTree } from './sweep.ts'

/** A tree of some directories, a clock that jumps to the end of each sleep, and what was looked at when. */
class World implements SweepEffects, SweptTree {
  nowMs = 0
  readonly ids: number[]
  readonly looks: { atMs: number; ids: readonly number[] }[] = []
  readonly #stop: AbortController
  readonly #untilMs: number
  wakes = 0

  constructor(ids: number[], untilMs: number, stop: AbortController) {
    this.ids = ids
    this.#untilMs = untilMs
    this.#stop = stop
  }

  now(): number {
    return this.nowMs
  }

  async sleep(ms: number, signal: AbortSignal): Promise<void> {
    this.nowMs += ms
    this.wakes += 1
    if (this.nowMs > this.#untilMs) this.#stop.abort(new Error('stopped'))
    signal.throwIfAborted()
  }

  count(): number {
    return this.ids.length
  }

  after(id: number, most: number): number[] {
    return this.ids.filter((each) => each > id).slice(0, most)
  }

  async look(ids: readonly number[]): Promise<void> {
    this.looks.push({ atMs: this.nowMs, ids })
  }
}

async function swept(ids: number[], untilMs: number, request: Partial<SweepRequest> = {}) {
  const stop = new AbortController()
  const world = new World(ids, untilMs, stop)
  const sweep = new Sweep({ periodMs: 100_000, directoriesPerSecond: 1000, ...request }, world, world)
  await sweep.run(stop.signal)
  return { world, sweep, looked: world.looks.flatMap(({ ids }) => ids) }
}

const range = (count: number) => Array.from({ length: count }, (_, at) => (at + 1) * 3)

describe('a sweep', () => {
  test('looks at every directory once in its period, spread over it, and then begins anew', async () => {
    const ids = range(500)
    const { world, sweep, looked } = await swept(ids, 203_000)
    expect(looked.slice(0, 500)).toEqual(ids)
    expect(looked.slice(500, 1000)).toEqual(ids)
    expect(sweep.rounds).toBe(2)
    for (const { ids } of world.looks) expect(ids.length).toBeLessThanOrEqual(6)
  })

  test('wakes once a second at most, and not before there is something to do', async () => {
    expect((await swept(range(100_000), 60_000)).world.wakes).toBeLessThanOrEqual(61)
    expect((await swept(range(2), 1_000_000)).world.wakes).toBeLessThanOrEqual(21)
  })

  test('never looks at more directories in a second than it may, and takes longer instead', async () => {
    const { world, looked } = await swept(range(100_000), 60_000, { directoriesPerSecond: 10 })
    expect(looked.length).toBeLessThanOrEqual(600)
    for (const { ids } of world.looks) expect(ids.length).toBeLessThanOrEqual(11)
  })

  test('does not make up for a standstill all at once', async () => {
    const stop = new AbortController()
    const world = new World(range(100_000), 1e9, stop)
    const sleep = world.sleep.bind(world)
    let asleep = 0
    world.sleep = async (ms, signal) => {
      await sleep(asleep++ === 5 ? 3_600_000 : ms, signal)
      if (asleep === 8) stop.abort(new Error('stopped'))
    }
    await new Sweep({ periodMs: 100_000, directoriesPerSecond: 1000 }, world, world).run(stop.signal)
    for (const { ids } of world.looks) expect(ids.length).toBeLessThanOrEqual(1001)
  })

  test('an empty tree, or one whose directories are gone, is waited for', async () => {
    const { looked } = await swept([], 500_000)
    expect(looked).toEqual([])
  })

  test('a failed look ends it, with its error', async () => {
    const world = new World(range(10), 1e9, new AbortController())
    world.look = async () => {
      throw new Error('no index')
    }
    const sweep = new Sweep({ periodMs: 1000, directoriesPerSecond: 10 }, world, world)
    await expect(sweep.run(new AbortController().signal)).rejects.toThrow('no index')
  })
})
