import { ChokidarSource } from './chokidar.ts'
import { WatchLimitError } from './errors.ts'
import { FanotifySource, whyNotFanotify } from './fanotify.ts'
import { PollSource } from './poll.ts'
import { remoteFileSystemOf } from './remote.ts'
import type { BlindSpot, Hint, Source, SourceRequest } from './source.ts'

/**
 * The source that was asked for, or with `auto` the best that works: `poll` where other machines can write, for no kernel
 * hears of that; `fanotify` where this process may mark the file system; else `chokidar`, and `poll` where its watches
 * run out. Which one it became, and what that cannot see, stand in `kind` and `blindSpots` once it has started.
 * @throws {SourceUnavailableError} from `start`, when what was asked for does not work here
 */
export function openSource(request: SourceRequest): Source {
  switch (request.choice) {
    case 'fanotify':
      return withRemote(new FanotifySource(request), request)
    case 'chokidar':
      return withRemote(new ChokidarSource(request), request)
    case 'poll':
      return new PollSource(request)
    case 'auto':
      if (remoteFileSystemOf(request.rootFd) !== undefined) return new PollSource(request)
      if (whyNotFanotify(request.rootFd) === undefined) return new FanotifySource(request)
      return new WatchOrPoll(request)
  }
}

/** A watch by choice on a file system where it cannot see everything. */
function withRemote(source: Source, { rootFd }: SourceRequest): Source {
  const remote = remoteFileSystemOf(rootFd)
  if (remote === undefined) return source
  const spot: BlindSpot = { code: 'REMOTE_WRITES', message: `What other machines write to ${remote} is not seen.` }
  return {
    kind: source.kind,
    get blindSpots() {
      return [spot, ...source.blindSpots]
    },
    start: (handle) => source.start(handle),
    drain: () => source.drain(),
    stop: () => source.stop(),
  }
}

class WatchOrPoll implements Source {
  readonly #request: SourceRequest
  #source: Source
  #isLimited = false

  constructor(request: SourceRequest) {
    this.#request = request
    this.#source = new ChokidarSource(request)
  }

  get kind(): Source['kind'] {
    return this.#source.kind
  }

  get blindSpots(): readonly BlindSpot[] {
    return this.#isLimited ? [LIMITED, ...this.#source.blindSpots] : this.#source.blindSpots
  }

  async start(handle: (hint: Hint) => void): Promise<void> {
    try {
      await this.#source.start(handle)
    } catch (error) {
      if (!(error instanceof WatchLimitError)) throw error
      this.#isLimited = true
      this.#source = new PollSource(this.#request)
      await this.#source.start(handle)
    }
  }

  drain(): Promise<void> {
    return this.#source.drain()
  }

  stop(): Promise<void> {
    return this.#source.stop()
  }
}

const LIMITED: BlindSpot = {
  code: 'WATCH_LIMIT',
  message: 'The tree has more directories than fs.inotify.max_user_watches allows, so it is polled.',
}
