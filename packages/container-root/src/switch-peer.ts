import { createInterface } from 'node:readline'
import type { Readable, Writable } from 'node:stream'
import { setTimeout as delay } from 'node:timers/promises'
import { LsyncError } from '@lsync/posix'
import { type Connection, ConnectionLostError, ProtocolError } from '@lsync/ssh'
import { z } from 'zod'
import { HookName } from './hooks.ts'
import { SwitchPlan } from './switch-record.ts'
import { HookOutcome, PreCopyRound, Settlement, SideCheck, StopReport, type SwitchSide } from './switch-side.ts'

// What one end can be asked for, what goes with it, and what it answers. `docs/format.md`, "A switch on the wire".
const VERBS = {
  check: [z.strictObject({}), SideCheck],
  hook: [z.strictObject({ name: HookName, reason: z.string() }), HookOutcome.optional()],
  preCopy: [
    z.strictObject({ maxDowntimeMs: z.number().positive(), lastDelta: z.enum(['auto', 'tree', 'sealed']) }),
    z.array(PreCopyRound),
  ],
  stop: [SwitchPlan, StopReport],
  pass: [SwitchPlan, z.undefined()],
  mount: [SwitchPlan, z.undefined()],
  commit: [SwitchPlan, z.undefined()],
  undo: [z.strictObject({}), z.undefined()],
  settle: [z.strictObject({ id: z.string().exactOptional() }), Settlement],
  ping: [z.strictObject({}), z.undefined()],
} as const
type Verbs = typeof VERBS
export type SwitchVerb = keyof Verbs
export type Asked<V extends SwitchVerb> = z.infer<Verbs[V][0]>
export type Answered<V extends SwitchVerb> = z.infer<Verbs[V][1]>

/** One end of a switch, here or on another machine. */
export interface SwitchPeer {
  ask<V extends SwitchVerb>(verb: V, what: Asked<V>, signal?: AbortSignal): Promise<Answered<V>>
  close(): Promise<void>
}

/** The end on this node, in this process. */
export class LocalPeer implements SwitchPeer {
  readonly #side: SwitchSide

  constructor(side: SwitchSide) {
    this.#side = side
  }

  async ask<V extends SwitchVerb>(verb: V, what: Asked<V>, signal?: AbortSignal): Promise<Answered<V>> {
    return (await carryOut(this.#side, verb, what, signal)) as Answered<V>
  }

  async close(): Promise<void> {
    // Whoever opened the root closes it.
  }
}

async function carryOut(side: SwitchSide, verb: SwitchVerb, what: unknown, signal?: AbortSignal): Promise<unknown> {
  switch (verb) {
    case 'check':
      return side.check()
    case 'hook': {
      const { name, reason } = VERBS.hook[0].parse(what)
      return side.hook(name, reason, signal)
    }
    case 'preCopy': {
      const { maxDowntimeMs, lastDelta } = VERBS.preCopy[0].parse(what)
      return side.preCopy(maxDowntimeMs, lastDelta, signal)
    }
    case 'stop':
      return side.stop(SwitchPlan.parse(what), signal)
    case 'pass':
      return side.pass(SwitchPlan.parse(what))
    case 'mount':
      return side.mount(SwitchPlan.parse(what))
    case 'commit':
      return side.commit(SwitchPlan.parse(what))
    case 'undo':
      return side.undo()
    case 'settle':
      return side.settle({ ...VERBS.settle[0].parse(what), ...(signal && { signal }) })
    case 'ping':
      return undefined
  }
}

const Request = z.object({ id: z.int(), verb: z.string(), what: z.unknown() })
const Response = z.object({
  id: z.int(),
  result: z.unknown().optional(),
  error: z.object({ code: z.string(), message: z.string(), hint: z.string().optional() }).optional(),
})
const LINE_CHARS = 1 << 20
const PING_MS = 5000
const CLOSE_MS = 2000
/** A silence of this long means that the connection is lost: longer than any call that keeps an end from answering. */
const SILENCE_MS = 60_000

/** The end on another machine, behind `lsync switch NAME --stdio`. */
export class RemotePeer implements SwitchPeer {
  readonly #connection: Connection
  readonly #waiting = new Map<number, { resolve: (result: unknown) => void; reject: (error: Error) => void }>()
  readonly #pinger: NodeJS.Timeout
  #heardMs = performance.now()
  #nextId = 1
  #failure: Error | undefined

  constructor(connection: Connection) {
    this.#connection = connection
    void this.#read()
    // A program that ends at once tells why by its end, which may come after the first write that it did not read.
    connection.writable.on('error', async ({ message }: Error) =>
      this.#fail((await connection.explain()) ?? new ConnectionLostError(message)),
    )
    this.#pinger = setInterval(() => {
      if (performance.now() - this.#heardMs > SILENCE_MS) {
        this.#fail(new ConnectionLostError(`nothing came for ${SILENCE_MS / 1000} s`))
      } else void this.ask('ping', {}).catch(() => undefined)
    }, PING_MS)
    this.#pinger.unref()
  }

  async ask<V extends SwitchVerb>(verb: V, what: Asked<V>, signal?: AbortSignal): Promise<Answered<V>> {
    signal?.throwIfAborted()
    if (this.#failure !== undefined) throw this.#failure
    const id = this.#nextId++
    const answer = new Promise<unknown>((resolve, reject) => this.#waiting.set(id, { resolve, reject }))
    this.#connection.writable.write(`${JSON.stringify({ id, verb, what })}\n`)
    try {
      return (await withSignal(answer, signal)) as Answered<V>
    } finally {
      this.#waiting.delete(id)
    }
  }

  async close(): Promise<void> {
    clearInterval(this.#pinger)
    this.#failure ??= new ConnectionLostError('it was closed')
    this.#connection.writable.end()
    // It ends by itself once its input has; whoever does not is cut off.
    if (!this.#connection.readable.closed) {
      const closed = new AbortController()
      const ended = new Promise<void>((resolve) => this.#connection.readable.once('close', resolve))
      await Promise.race([ended, delay(CLOSE_MS, undefined, { signal: closed.signal }).catch(() => undefined)])
      closed.abort()
    }
    this.#connection.destroy()
  }

  async #read(): Promise<void> {
    try {
      for await (const line of linesOf(this.#connection.readable)) {
        this.#heardMs = performance.now()
        const { id, result, error } = Response.parse(JSON.parse(line))
        const waiting = this.#waiting.get(id)
        if (error === undefined) waiting?.resolve(result)
        else
          waiting?.reject(
            new LsyncError(error.code, error.message, error.hint === undefined ? {} : { hint: error.hint }),
          )
      }
      this.#fail((await this.#connection.explain()) ?? new ConnectionLostError('the other side ended it'))
    } catch (error) {
      const isOurs = error instanceof LsyncError
      this.#fail(isOurs ? error : new ConnectionLostError(error instanceof Error ? error.message : String(error)))
    }
  }

  #fail(error: Error): void {
    clearInterval(this.#pinger)
    this.#failure ??= error
    for (const { reject } of this.#waiting.values()) reject(this.#failure)
    this.#connection.destroy()
  }
}

async function withSignal<T>(answer: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return answer
  const done = new AbortController()
  const aborted = new Promise<never>((_, reject) => {
    signal.addEventListener('abort', () => reject(signal.reason), { once: true, signal: done.signal })
  })
  try {
    return await Promise.race([answer, aborted])
  } finally {
    done.abort()
  }
}

async function* linesOf(stream: Readable): AsyncGenerator<string> {
  for await (const line of createInterface({ input: stream, crlfDelay: Number.POSITIVE_INFINITY })) {
    if (line.length > LINE_CHARS) throw new ProtocolError('a line is too long')
    yield line
  }
}

/**
 * Is one end of a switch that another machine drives: answers until the input ends or falls silent. If that was in the middle, this
 * node settles the switch by itself. Gives what came of that; `undefined` when nothing was left to settle.
 */
export async function serveSwitch(
  side: SwitchSide,
  { input, output }: { readonly input: Readable; readonly output: Writable },
  signal?: AbortSignal,
): Promise<Settlement | undefined> {
  // Whoever asked may be gone before the answer.
  output.on('error', () => undefined)
  let heardMs = performance.now()
  let isOpen = false
  const gone = new AbortController()
  const watch = setInterval(() => {
    if (performance.now() - heardMs > SILENCE_MS) input.destroy(new ConnectionLostError('nobody asks any more'))
  }, PING_MS)
  watch.unref()
  let working: Promise<void> = Promise.resolve()
  try {
    for await (const line of linesOf(input)) {
      heardMs = performance.now()
      signal?.throwIfAborted()
      const { id, verb, what } = Request.parse(JSON.parse(line))
      const known = Object.hasOwn(VERBS, verb) ? (verb as SwitchVerb) : undefined
      const answer = async () => {
        if (known === undefined) throw new ProtocolError(`it asks for ${verb.slice(0, 100)}`)
        if (known === 'stop' || known === 'mount') isOpen = true
        const result = await carryOut(side, known, what, gone.signal)
        if (known === 'pass') isOpen = true
        if (known === 'commit' || known === 'undo' || known === 'settle') isOpen = false
        return result
      }
      const tell = (content: object) => void output.write(`${JSON.stringify({ id, ...content })}\n`)
      // Pings are answered while something is done.
      const turn = known === 'ping' ? Promise.resolve() : working
      const done = turn.then(answer).then(
        (result) => tell({ result }),
        (error: unknown) => tell({ error: toldOf(error) }),
      )
      if (known !== 'ping') working = done
    }
  } catch (error) {
    if (!(error instanceof ConnectionLostError)) throw error
  } finally {
    clearInterval(watch)
  }
  // What runs before anything was stopped is given up; the rest comes to its end.
  if (!isOpen) gone.abort(new ConnectionLostError('nobody asks any more'))
  await working
  return isOpen ? await side.settle(signal === undefined ? {} : { signal }) : undefined
}

function toldOf(error: unknown): { readonly code: string; readonly message: string; readonly hint?: string } {
  if (error instanceof LsyncError) {
    return { code: error.code, message: error.message, ...(error.hint === undefined ? {} : { hint: error.hint }) }
  }
  return { code: 'BUG', message: error instanceof Error ? (error.stack ?? error.message) : String(error) }
}
