import type { Redirect } from './model/entry.ts'
import { type EntryPath, join, type Name, split } from './model/path.ts'

/** How a directory (or metacopy) of a result says where the layers below join it. */
export interface Emission {
  readonly opaque: boolean
  readonly redirect?: Redirect
}

const PLAIN: Emission = { opaque: false }
const CLOSED: Emission = { opaque: true }

/**
 * The marks that make `name` merge with `origin` (a path in what lies below; `undefined`: with nothing), when its
 * parent merges with `parentOrigin`. Total, O(1). Source: overlay-format "merge algebra", emission.
 */
export function emission(origin: EntryPath | undefined, parentOrigin: EntryPath | undefined, name: Name): Emission {
  const inherited = parentOrigin === undefined ? undefined : join(parentOrigin, name)
  if (origin === inherited) return PLAIN
  if (origin === undefined) return CLOSED
  const { parent, name: last } = split(origin)
  if (parentOrigin !== undefined && parent === parentOrigin) {
    return { opaque: false, redirect: last as string as Redirect }
  }
  return { opaque: false, redirect: `/${origin}` as Redirect }
}
