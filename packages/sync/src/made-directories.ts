import type { TreePath } from './model/operation.ts'

/** A directory that was made, with what tells it from another in its place; `undefined`: it is finished. */
export type MadeNews = readonly [path: TreePath, identity: string | undefined]

/** Beyond this it forgets which there were, for a sender could make any number. */
const MOST = 1 << 14

/**
 * Directories of a target that were made and are not finished. Threads that work on one target tell each other with
 * `takeNews` and `learn`, since one may fill what another one has made.
 */
export class MadeDirectories {
  readonly #identities = new Map<TreePath, string>()
  #news: MadeNews[] = []

  /** What tells the directory that was made at a path from another one there. */
  identityOf(path: TreePath): string | undefined {
    return this.#identities.get(path)
  }

  add(path: TreePath, identity: string): void {
    this.#set(path, identity)
    this.#news.push([path, identity])
  }

  finish(path: TreePath): void {
    if (this.#identities.delete(path)) this.#news.push([path, undefined])
  }

  clear(): void {
    this.#identities.clear()
    this.#news = []
  }

  /** What has been added and finished here since the last call. */
  takeNews(): readonly MadeNews[] {
    const news = this.#news
    this.#news = []
    return news
  }

  /** Takes over what another one has told. */
  learn(news: readonly MadeNews[]): void {
    for (const [path, identity] of news) {
      if (identity === undefined) this.#identities.delete(path)
      else this.#set(path, identity)
    }
  }

  #set(path: TreePath, identity: string): void {
    if (this.#identities.size >= MOST) this.#identities.clear()
    this.#identities.set(path, identity)
  }
}
