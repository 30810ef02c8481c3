import { type HostPath, LsyncError, printable, syncFileSystemAsync, WriteBack } from '@lsync/posix'
import type { Checkpoint } from '../model/checkpoint.ts'
import type { Failure } from '../model/operation.ts'
import { TargetPlace } from '../target-state.ts'
import type { Target, TargetState } from './target.ts'

/** A directory of this machine, on whatever file system it is: the workers write into it themselves. */
export class LocalTarget implements Target {
  readonly description: string
  readonly #path: HostPath
  #place: TargetPlace | undefined
  #writeBack: WriteBack | undefined

  /** `description` is what index and journal are kept for; another one than the path for a target that moves about. */
  constructor(path: HostPath, description: string = printable(path)) {
    this.#path = path
    this.description = description
  }

  get delivery(): { readonly mode: 'direct'; readonly rootFd: number; readonly stageFd: number } {
    const { rootFd, stageFd } = this.#opened
    return { mode: 'direct', rootFd, stageFd }
  }

  async open(signal: AbortSignal, isKnown = false): Promise<TargetState> {
    signal.throwIfAborted()
    this.#place = TargetPlace.open(this.#path, { create: !isKnown, isKnown })
    this.#writeBack = new WriteBack(this.#place.rootFd)
    return this.#place.state
  }

  isThere(): boolean {
    try {
      this.#place?.assertThere()
      return this.#place !== undefined
    } catch (error) {
      if (!(error instanceof LsyncError)) throw error
      return false
    }
  }

  deliver(): Promise<readonly Failure[]> {
    throw new Error('operations at a local target are carried out by the workers')
  }

  wrote(bytes: number, files: number): void {
    this.#writeBack?.wrote(bytes, files)
  }

  async barrier(checkpoint?: Checkpoint): Promise<void> {
    const place = this.#opened
    await syncFileSystemAsync(place.rootFd, this.#path)
    place.assertThere()
    if (checkpoint !== undefined) place.storeCheckpoint(checkpoint)
  }

  async close(): Promise<void> {
    // Until then its file system could not be unmounted.
    await this.#writeBack?.end()
    this.#place?.close()
    this.#place = undefined
  }

  get #opened(): TargetPlace {
    if (this.#place === undefined) throw new Error('the target is not open')
    return this.#place
  }
}
