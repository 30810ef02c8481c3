import { type ChildProcess, spawn } from 'node:child_process'
import { createInterface } from 'node:readline'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import type { LeaseClaim, LeaseHeldError, Leases } from '@lsync/container-root'
import { afterAll, describe, test } from 'vitest'

/** One keeper of leases under test. */
export interface LeaseSubject {
  /** A root that nobody has claimed: where a child finds it. */
  fresh(): string
  open(where: string, durationMs: number): Leases
  /** Puts back what was kept at `keep`, as a restored backup does. */
  keep(where: string): Promise<() => Promise<void>>
}

// Long enough that a busy machine does not silence a living holder.
const DURATION_MS = 5000
const CHILD = fileURLToPath(new URL('../support/lease-child.ts', import.meta.url))

interface Answer {
  readonly done: string
  readonly result?: LeaseClaim
  readonly code?: string
  readonly message?: string
}

/** A node in a process of its own. */
class Node {
  readonly process: ChildProcess
  readonly #lines: AsyncIterator<string>

  constructor(name: string, where: string, skewMs = 0) {
    this.process = spawn(process.execPath, [CHILD, name, where, String(DURATION_MS), String(skewMs)], {
      stdio: ['pipe', 'pipe', 'inherit'],
    })
    this.#lines = createInterface({ input: this.process.stdout as NodeJS.ReadableStream })[Symbol.asyncIterator]()
    children.add(this.process)
  }

  async do(command: 'acquire' | 'takeover' | 'check' | 'release'): Promise<Answer> {
    this.process.stdin?.write(`${command}\n`)
    const line = await this.#lines.next()
    return line.done === true ? { done: command, code: 'ENDED' } : (JSON.parse(line.value) as Answer)
  }

  async kill(): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return
    const ended = new Promise((resolve) => this.process.once('exit', resolve))
    this.process.kill('SIGKILL')
    await ended
  }
}

const children = new Set<ChildProcess>()

/** What a lease is, whatever keeps it. */
export function describeLeases(name: string, subject: LeaseSubject): void {
  afterAll(() => {
    for (const child of children) child.kill('SIGKILL')
  })

  describe.concurrent(`leases ${name}`, () => {
    const fresh = () => {
      const where = subject.fresh()
      return { where, leases: subject.open(where, DURATION_MS) }
    }

    test('a root has one holder, who is named to others, and epochs grow', async ({ expect }) => {
      const { leases } = fresh()
      expect(await leases.read()).toBeUndefined()
      const first = await leases.acquire({ node: 'one' })
      expect(first.epoch).toBe(1)
      await expect(leases.acquire({ node: 'two' })).rejects.toMatchObject({
        code: 'LEASE_HELD',
        message: expect.stringContaining('one') as string,
      })
      await expect(leases.acquire({ node: 'one' })).rejects.toMatchObject({ code: 'LEASE_HELD' })
      await first.check()
      await leases.check(1)
      await first.release()
      await first.release()
      await expect(first.check()).rejects.toMatchObject({ code: 'LEASE_LOST' })
      await expect(leases.check(1)).rejects.toMatchObject({ code: 'LEASE_LOST' })
      const second = await leases.acquire({ node: 'two' })
      expect(second.epoch).toBe(2)
      await expect(leases.check(1)).rejects.toMatchObject({ code: 'LEASE_LOST' })
      expect((await leases.read())?.claim).toEqual(second.claim)
    })

    test('a lease that is handed to a node is for that one, or for the giver again', async ({ expect }) => {
      const { leases } = fresh()
      const first = await leases.acquire({ node: 'one' })
      await first.release({ to: 'two' })
      expect(await leases.read()).toMatchObject({ isReleased: true, releasedTo: 'two' })
      await expect(leases.acquire({ node: 'three' })).rejects.toMatchObject({ code: 'LEASE_HELD' })
      const second = await leases.acquire({ node: 'two' })
      await expect(leases.acquire({ node: 'one' })).rejects.toMatchObject({ code: 'LEASE_HELD' })
      await second.release({ to: 'three' })
      expect((await leases.acquire({ node: 'two' })).epoch).toBe(3)
      await expect(leases.acquire({ node: 'three' })).rejects.toMatchObject({ code: 'LEASE_HELD' })
    })

    test('a claim is taken up again by its token alone', async ({ expect }) => {
      const { where, leases } = fresh()
      const { epoch, claim } = await leases.acquire({ node: 'one' })
      const later = subject.open(where, DURATION_MS)
      await expect(later.resume({ epoch, token: '0'.repeat(32) })).rejects.toMatchObject({ code: 'LEASE_LOST' })
      await expect(later.resume({ epoch: epoch + 1, token: claim.token })).rejects.toMatchObject({ code: 'LEASE_LOST' })
      const resumed = await later.resume({ epoch, token: claim.token })
      await resumed.check()
      await resumed.release()
      await expect(leases.resume({ epoch, token: claim.token })).rejects.toMatchObject({ code: 'LEASE_LOST' })
    })

    test('of many processes that want it at once, one gets it, again and again', async ({ expect }) => {
      const { where, leases } = fresh()
      const nodes = ['a', 'b', 'c', 'd'].map((node) => new Node(node, where))
      for (let round = 1; round <= 5; round++) {
        const answers = await Promise.all(nodes.map((node) => node.do('acquire')))
        const winners = nodes.filter((_, index) => answers[index]?.result !== undefined)
        expect(winners).toHaveLength(1)
        const losers = answers.filter(({ result }) => result === undefined)
        expect(losers.map(({ code }) => code)).toEqual(['LEASE_HELD', 'LEASE_HELD', 'LEASE_HELD'])
        expect((await leases.read())?.claim.epoch).toBe(round)
        await winners[0]?.do('release')
      }
      await Promise.all(nodes.map((node) => node.kill()))
    })

    test('nobody takes over from a living holder, whatever its clock says', async ({ expect }) => {
      const { where, leases } = fresh()
      const holder = new Node('one', where, -3_600_000)
      expect((await holder.do('acquire')).result?.epoch).toBe(1)
      await expect(leases.takeover({ node: 'two' })).rejects.toMatchObject({ code: 'LEASE_HELD' })
      expect(await holder.do('check')).toEqual({ done: 'check' })
      await holder.kill()
    })

    test('after a SIGKILL one of many takes over, not before the claim expired', async ({ expect }) => {
      const { where, leases } = fresh()
      // Its clock is an hour ahead, and with it whatever it writes down.
      const holder = new Node('one', where, 3_600_000)
      await holder.do('acquire')
      await holder.kill()
      const startedMs = performance.now()
      const takers = ['two', 'three', 'four'].map((node) => new Node(node, where, node === 'two' ? -3_600_000 : 0))
      let answers = await Promise.all(takers.map((node) => node.do('takeover')))
      // etcd says at once that the claim has not expired yet.
      for (let again = 0; again < 50 && !answers.some(({ result }) => result); again++) {
        expect(answers.every(({ code }) => code === 'LEASE_HELD')).toBe(true)
        await delay(500)
        answers = await Promise.all(takers.map((node) => node.do('takeover')))
      }
      // The last beat was some moments before the kill.
      expect(performance.now() - startedMs).toBeGreaterThan(DURATION_MS / 2)
      expect(answers.filter(({ result }) => result !== undefined).map(({ result }) => result?.epoch)).toEqual([2])
      expect((await leases.read())?.claim.epoch).toBe(2)
      await Promise.all(takers.map((node) => node.kill()))
    })

    test('a node that was asleep is refused once another took over', async ({ expect }) => {
      const { where, leases } = fresh()
      const sleeper = new Node('one', where)
      await sleeper.do('acquire')
      sleeper.process.kill('SIGSTOP')
      const second = await untilTaken(leases, 'two')
      second.keepAlive()
      expect(second.epoch).toBe(2)
      sleeper.process.kill('SIGCONT')
      expect(await sleeper.do('check')).toMatchObject({ code: 'LEASE_LOST' })
      expect(await sleeper.do('release')).toMatchObject({ code: 'LEASE_LOST' })
      await second.check()
      await second.release()
      await sleeper.kill()
    })

    test('a node that was asleep goes on when nobody took over', async ({ expect }) => {
      const { where, leases } = fresh()
      const sleeper = new Node('one', where)
      await sleeper.do('acquire')
      sleeper.process.kill('SIGSTOP')
      await delay(DURATION_MS + 3000)
      sleeper.process.kill('SIGCONT')
      expect(await sleeper.do('check')).toEqual({ done: 'check' })
      await expect(leases.takeover({ node: 'two' })).rejects.toMatchObject({ code: 'LEASE_HELD' })
      await sleeper.kill()
    })

    test('by force it is taken at once, and the holder is refused', async ({ expect }) => {
      const { leases } = fresh()
      const first = await leases.acquire({ node: 'one' })
      first.keepAlive()
      const second = await leases.takeover({ node: 'two', force: true })
      expect(second.epoch).toBe(2)
      await expect(first.check()).rejects.toMatchObject({ code: 'LEASE_LOST' })
      expect(first.signal.aborted).toBe(true)
      expect(() => first.signal.throwIfAborted()).toThrow(/epoch 1/)
    })

    test('a keeper that shows an older state is found out', async ({ expect }) => {
      const { where, leases } = fresh()
      const first = await leases.acquire({ node: 'one' })
      const restore = await subject.keep(where)
      await first.release()
      const second = await leases.acquire({ node: 'two' })
      await restore()
      await expect(second.check()).rejects.toMatchObject({ code: 'LEASE_LOST' })
      await expect(leases.acquire({ node: 'two', seenEpoch: 2 })).rejects.toMatchObject({ code: 'STORE_WENT_BACK' })
      await expect(leases.takeover({ node: 'two', seenEpoch: 2 })).rejects.toMatchObject({ code: 'STORE_WENT_BACK' })
      const third = await leases.takeover({ node: 'two', seenEpoch: 2, force: true })
      expect(third.epoch).toBe(3)
    })

    test('a signal ends the wait for a silent holder', async ({ expect }) => {
      const { leases } = fresh()
      await leases.acquire({ node: 'one' })
      const taking = leases.takeover({ node: 'two', signal: AbortSignal.timeout(300) })
      const error = (await taking.catch((cause: unknown) => cause)) as LeaseHeldError
      // etcd has nothing to wait for.
      expect(['TimeoutError', 'AbortError', 'LeaseHeldError']).toContain(error.name)
    })
  })
}

/** Takes over as an operator would: again and again until the holder has been silent for long enough. */
async function untilTaken(leases: Leases, node: string) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await leases.takeover({ node })
    } catch (error) {
      if ((error as { code?: unknown }).code !== 'LEASE_HELD' || attempt > 100) throw error
      await delay(500)
    }
  }
}
