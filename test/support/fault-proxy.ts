import { connect, createServer, type Server, type Socket } from 'node:net'

/** What happens to one exchange: a request and its answer where HTTP is spoken, else a connection. */
export type Fault =
  /** Reset before anything passes. */
  | { readonly kind: 'refuse' }
  /** Answered in the server's place, without (or with `afterwards: true` behind) its having done it. HTTP only. */
  | { readonly kind: 'status'; readonly status: number; readonly afterwards?: boolean; readonly headers?: string }
  /** That many bytes pass in one direction, then both sides are reset. */
  | { readonly kind: 'cut'; readonly direction: 'up' | 'down'; readonly afterBytes: number }
  /** That many bytes of the answer pass, then the connection ends in good order. */
  | { readonly kind: 'truncate'; readonly afterBytes: number }
  /** That many bytes pass in one direction, then nothing more, and the connection stays. */
  | { readonly kind: 'stall'; readonly direction: 'up' | 'down'; readonly afterBytes: number }
  | { readonly kind: 'delay'; readonly delayMs: number }

export interface FaultProxyOptions {
  readonly port: number
  readonly speaks: 'http' | 'bytes'
  /** Decides about the n-th exchange, counted from 0. */
  readonly fault?: (exchange: number) => Fault | undefined
}

/** A TCP proxy on loopback between a client and a server of the test's own, which does what lines do. */
export interface FaultProxy {
  readonly port: number
  /** Exchanges so far. */
  readonly exchanges: number
  /** Faults so far. */
  readonly faults: number
  /** Another rule for the exchanges from now on, counted from 0 again. */
  use(fault: ((exchange: number) => Fault | undefined) | undefined): void
  /** Resets all connections. How many there were. */
  cutAll(): number
  stop(): Promise<void>
}

const REQUEST = /^(GET|PUT|POST|HEAD|DELETE) /

export async function startFaultProxy({ port, speaks, fault }: FaultProxyOptions): Promise<FaultProxy> {
  let rule = fault
  let [exchanges, faults] = [0, 0]
  const lines = new Set<Line>()
  const next = () => {
    const found = rule?.(exchanges++)
    if (found !== undefined) faults++
    return found
  }
  const server = createServer((client) => {
    const line = new Line(client, port, speaks, next)
    lines.add(line)
    client.once('close', () => lines.delete(line))
  })
  await listen(server)
  const address = server.address()
  return {
    port: typeof address === 'object' && address !== null ? address.port : 0,
    get exchanges() {
      return exchanges
    },
    get faults() {
      return faults
    },
    use(next) {
      rule = next
      exchanges = 0
    },
    cutAll() {
      const count = lines.size
      for (const line of lines) line.reset()
      return count
    },
    async stop() {
      for (const line of lines) line.reset()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

/** One connection through the proxy. */
class Line {
  readonly #client: Socket
  readonly #server: Socket
  readonly #speaks: 'http' | 'bytes'
  readonly #next: () => Fault | undefined
  #fault: Fault | undefined
  #passed = { up: 0, down: 0 }
  #isHead = false
  #isOver = false

  constructor(client: Socket, port: number, speaks: 'http' | 'bytes', next: () => Fault | undefined) {
    this.#client = client
    this.#speaks = speaks
    this.#next = next
    this.#server = connect(port, '127.0.0.1')
    for (const socket of [client, this.#server]) {
      socket.setNoDelay(true)
      // Resets are what this is for.
      socket.on('error', () => this.reset())
    }
    client.on('data', (bytes) => this.#up(bytes))
    this.#server.on('data', (bytes) => this.#down(bytes))
    client.on('end', () => this.#isStalled('up') || this.#server.end())
    this.#server.on('end', () => this.#isStalled('down') || this.#isOver || client.end())
    if (speaks === 'bytes') this.#begin()
  }

  reset(): void {
    this.#isOver = true
    this.#client.resetAndDestroy()
    this.#server.resetAndDestroy()
  }

  #begin(): void {
    this.#passed = { up: 0, down: 0 }
    this.#fault = this.#next()
    if (this.#fault?.kind === 'refuse') this.reset()
    if (this.#fault?.kind === 'status' && this.#fault.afterwards !== true) this.#answer(this.#fault)
  }

  #up(bytes: Buffer): void {
    if (this.#isOver) return
    const start = bytes.toString('latin1', 0, 8)
    if (this.#speaks === 'http' && REQUEST.test(start)) {
      this.#isHead = start.startsWith('HEAD')
      this.#begin()
    }
    this.#pass('up', bytes, this.#client, this.#server)
  }

  #down(bytes: Buffer): void {
    if (this.#isOver) return
    if (this.#fault?.kind === 'status') this.#answer(this.#fault)
    else this.#pass('down', bytes, this.#server, this.#client)
  }

  #pass(direction: 'up' | 'down', bytes: Buffer, from: Socket, to: Socket): void {
    if (this.#isOver) return
    const fault = this.#fault
    if (fault?.kind === 'delay') {
      from.pause()
      setTimeout(() => {
        to.write(bytes)
        from.resume()
      }, fault.delayMs)
      this.#fault = undefined
      return
    }
    const isHere =
      fault !== undefined &&
      (fault.kind === 'truncate' ? direction === 'down' : 'direction' in fault && fault.direction === direction)
    const room = isHere && 'afterBytes' in fault ? fault.afterBytes - this.#passed[direction] : Number.POSITIVE_INFINITY
    this.#passed[direction] += Math.min(room, bytes.length)
    if (bytes.length < room) {
      if (!to.write(bytes)) {
        from.pause()
        to.once('drain', () => from.resume())
      }
      return
    }
    if (room > 0) to.write(bytes.subarray(0, room))
    if (fault?.kind === 'cut') this.reset()
    if (fault?.kind === 'truncate') {
      this.#isOver = true
      this.#client.end()
      this.#server.destroy()
    }
  }

  #isStalled(direction: 'up' | 'down'): boolean {
    return this.#fault?.kind === 'stall' && this.#fault.direction === direction
  }

  #answer({ status, headers = '' }: Fault & { kind: 'status' }): void {
    this.#isOver = true
    this.#server.destroy()
    const body = this.#isHead ? '' : 'fault'
    this.#client.write(`HTTP/1.1 ${status} Injected\r\n${headers}Content-Length: 5\r\nConnection: close\r\n\r\n${body}`)
    // What the client still sends is read and forgotten, so that it comes to reading the answer.
    this.#client.end()
  }
}

function listen(server: Server): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject)
    server.listen(0, '127.0.0.1', resolve)
  })
}

/** Every `every`-th exchange meets the next of these faults in turn. */
export function faultsInTurn(every: number, faults: readonly Fault[]): (exchange: number) => Fault | undefined {
  return (exchange) =>
    exchange % every === every - 1 ? faults[Math.floor(exchange / every) % faults.length] : undefined
}
