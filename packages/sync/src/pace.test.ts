import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Pace, type PaceEffects, type PaceLimits, parsePressure, systemPace } from './pace.ts'

/** A world whose clock moves only when somebody sleeps, and in which the pressure is what the test says. */
class World implements PaceEffects {
  nowMs = 0
  percent: number | undefined = 0
  reads = 0
  readonly #sleepers: { at: number; wake: () => void }[] = []

  now(): number {
    return this.nowMs
  }

  sleep(ms: number, signal: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#sleepers.push({ at: this.nowMs + ms, wake: resolve })
      signal.addEventListener('abort', () => reject(signal.reason))
    })
  }

  readPressure(): string | undefined {
    this.reads += 1
    return this.percent === undefined
      ? undefined
      : `some avg10=${this.percent.toFixed(2)} avg60=1.46 avg300=1.56 total=11711069\n`
  }

  /** Lets all that sleep wake in their order. */
  async run(): Promise<void> {
    for (;;) {
      await settle()
      this.#sleepers.sort((left, right) => left.at - right.at)
      const next = this.#sleepers.shift()
      if (next === undefined) return
      this.nowMs = Math.max(this.nowMs, next.at)
      next.wake()
    }
  }
}

const settle = () => new Promise((resolve) => setImmediate(resolve))
const never = new AbortController().signal

function paced(limits: PaceLimits): {
  world: World
  pace: Pace
  takeAt: (bytes: number, operations?: number) => Promise<number>
} {
  const world = new World()
  const pace = new Pace(limits, world)
  const takeAt = async (bytes: number, operations = 1) => {
    const taken = pace.take(bytes, operations, never)
    await world.run()
    await taken
    return world.nowMs
  }
  return { world, pace, takeAt }
}

describe('a rate', () => {
  test('lets a burst through at once and then holds the average', async () => {
    const { takeAt } = paced({ bytesPerSecond: 1000 })
    expect(await takeAt(250)).toBe(0)
    expect(await takeAt(100)).toBe(100)
    expect(await takeAt(900)).toBe(1000)
  })

  test('saves up no more than a burst while nothing is sent', async () => {
    const { world, takeAt } = paced({ bytesPerSecond: 1000 })
    world.nowMs = 60_000
    expect(await takeAt(1250)).toBe(61_000)
  })

  test('is held for operations as for bytes, by the slower of the two', async () => {
    const { takeAt } = paced({ bytesPerSecond: 1_000_000, operationsPerSecond: 10 })
    expect(await takeAt(10, 2)).toBe(0)
    expect(await takeAt(10, 10)).toBe(950)
    expect(await takeAt(3_000_000, 1)).toBe(3700)
  })

  test('without limits nothing waits', async () => {
    const { takeAt } = paced({})
    expect(await takeAt(1e12, 1e9)).toBe(0)
  })

  test('is never passed by more than a burst, however the deliveries come', () =>
    fc.assert(
      fc.asyncProperty(
        fc.integer({ min: 1, max: 10_000 }),
        fc.array(fc.record({ bytes: fc.nat(20_000), idleMs: fc.nat(2000) }), { maxLength: 30 }),
        async (bytesPerSecond, deliveries) => {
          const { world, takeAt } = paced({ bytesPerSecond })
          let sent = 0
          for (const { bytes, idleMs } of deliveries) {
            world.nowMs += idleMs
            await takeAt(bytes)
            sent += bytes
            expect(sent).toBeLessThanOrEqual((world.nowMs / 1000 + 0.25) * bytesPerSecond + 1e-3)
          }
        },
      ),
    ))

  test('deliveries that wait together go in their order', async () => {
    const { world, pace } = paced({ bytesPerSecond: 1000 })
    const order: number[] = []
    const all = [300, 10, 200, 1].map((bytes, at) => pace.take(bytes, 1, never).then(() => order.push(at)))
    await world.run()
    await Promise.all(all)
    expect(order).toEqual([0, 1, 2, 3])
    expect(world.nowMs).toBeCloseTo(261)
  })

  test('a delivery that is given up leaves its share to the others', async () => {
    const { pace } = paced({ bytesPerSecond: 1000 })
    const stopping = new AbortController()
    const given = pace.take(10_000, 1, stopping.signal)
    stopping.abort(new Error('stopped'))
    await expect(given).rejects.toThrow('stopped')
    await expect(pace.take(1, 1, stopping.signal)).rejects.toThrow('stopped')
    // Nothing is owed: the whole burst is there without any wait, which would last for ever in this world.
    await pace.take(250, 1, never)
  })
})

describe('under I/O pressure', () => {
  const pressure = { highPercent: 60, lowPercent: 30 }

  test('it backs off further and further, but never stops', async () => {
    const { world, pace, takeAt } = paced({ pressure })
    world.percent = 80
    const waits: number[] = []
    for (let i = 0; i < 9; i++) {
      const before = world.nowMs
      waits.push((await takeAt(1)) - before)
      world.nowMs += 1000
    }
    expect(waits).toEqual([50, 100, 200, 400, 800, 1600, 2000, 2000, 2000])
    expect(pace.backOffMs).toBe(2000)
  })

  test('between the marks it stays as it was, so that it does not swing', async () => {
    const { world, pace, takeAt } = paced({ pressure })
    const backOffAt = async (percent: number) => {
      world.percent = percent
      world.nowMs += 1000
      await takeAt(1)
      return pace.backOffMs
    }
    expect(await backOffAt(59)).toBe(0)
    expect(await backOffAt(60)).toBe(50)
    expect(await backOffAt(31)).toBe(50)
    expect(await backOffAt(30)).toBe(0)
    expect(await backOffAt(45)).toBe(0)
  })

  test('the kernel is asked once a second at most, and not at all without the limit', async () => {
    const { world, takeAt } = paced({ pressure })
    for (let i = 0; i < 100; i++) {
      world.nowMs += 10
      await takeAt(1)
    }
    expect(world.reads).toBeLessThanOrEqual(2)
    const other = paced({ bytesPerSecond: 1000 })
    await other.takeAt(1)
    expect(other.world.reads).toBe(0)
  })

  test('where the kernel does not keep it, nothing waits', async () => {
    const { world, takeAt } = paced({ pressure })
    world.percent = undefined
    expect(await takeAt(1)).toBe(0)
  })
})

describe('parsePressure', () => {
  test('reads both lines', () => {
    const text = 'some avg10=0.76 avg60=1.46 avg300=1.56 total=11\nfull avg10=0.39 avg60=1.18 avg300=10.29 total=8\n'
    expect(parsePressure(text)).toEqual({
      some: { avg10Percent: 0.76, avg60Percent: 1.46, avg300Percent: 1.56 },
      full: { avg10Percent: 0.39, avg60Percent: 1.18, avg300Percent: 10.29 },
    })
  })

  test('is undefined for anything else', () => {
    expect(['', 'some', 'some avg10=x avg60=1 avg300=1 total=1'].map(parsePressure)).toEqual(Array(3).fill(undefined))
  })

  test('reads what this kernel says, if it says something', () => {
    const text = systemPace.readPressure()
    if (text !== undefined) expect(parsePressure(text)?.some.avg10Percent).toBeGreaterThanOrEqual(0)
  })
})

test('a real clock is kept', async () => {
  const pace = new Pace({ operationsPerSecond: 100 })
  const startedAt = performance.now()
  for (let i = 0; i < 45; i++) await pace.take(0, 1, never)
  expect(performance.now() - startedAt).toBeGreaterThan(150)
})
