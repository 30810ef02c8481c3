import { bytesOf, LsyncError } from '@lsync/posix'

/** A pattern that no path can match, or that cannot be read. */
export class PatternInvalidError extends LsyncError {
  constructor(pattern: string, why: string) {
    super('SYNC_PATTERN_INVALID', `the pattern ${pattern}: ${why}`, {
      hint: 'see `lsync sync --help` for what patterns are',
    })
  }
}

/**
 * Which paths take part. A pattern without a slash (one at its end excepted, which limits it to directories) is matched
 * against names at any depth, one with a slash against paths from the root on. `*` and `?` do not match a slash, `**`
 * does. What is included is not excluded; what lies in an excluded directory is, whatever the patterns say of it.
 */
export interface Patterns {
  readonly include: readonly string[]
  readonly exclude: readonly string[]
}

/** Tells whether a path (bytes) stays out. Its directory takes part. */
export type IsExcluded = (path: string, name: string, isDirectory: boolean) => boolean

interface Matcher {
  readonly expression: RegExp
  readonly isPath: boolean
  readonly directoriesOnly: boolean
}

/**
 * Compiles patterns; `undefined` where nothing is excluded.
 * @throws {PatternInvalidError}
 */
export function compilePatterns({ include, exclude }: Patterns): IsExcluded | undefined {
  if (exclude.length === 0) return undefined
  const included = include.map(compile)
  const excluded = exclude.map(compile)
  return (path, name, isDirectory) => {
    const matches = ({ expression, isPath, directoriesOnly }: Matcher) =>
      (isDirectory || !directoriesOnly) && expression.test(isPath ? path : name)
    return excluded.some(matches) && !included.some(matches)
  }
}

function compile(pattern: string): Matcher {
  const bytes = bytesOf(pattern)
  const directoriesOnly = bytes.endsWith('/')
  const body = bytes.replace(/^\//, '').replace(/\/$/, '')
  if (body === '') throw new PatternInvalidError(pattern, 'it names nothing')
  const isPath = bytes.replace(/\/$/, '').includes('/')
  let source = ''
  for (let at = 0; at < body.length; ) {
    const rest = body.slice(at)
    if (rest.startsWith('**/')) {
      source += '(?:.*/)?'
      at += 3
    } else if (rest.startsWith('**')) {
      source += '.*'
      at += 2
    } else if (rest.startsWith('*')) {
      source += '[^/]*'
      at++
    } else if (rest.startsWith('?')) {
      source += '[^/]'
      at++
    } else if (rest.startsWith('\\') && rest.length > 1) {
      source += escaped(rest.charAt(1))
      at += 2
    } else source += escaped(body.charAt(at++))
  }
  return { expression: new RegExp(`^${source}$`, 's'), isPath, directoriesOnly }
}

function escaped(character: string): string {
  return character.replace(/[\\^$.*+?()[\]{}|/]/, '\\$&')
}
