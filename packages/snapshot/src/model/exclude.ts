import { type ByteString, LsyncError, textOf } from '@lsync/posix'

/** A pattern that means nothing. */
export class PatternInvalidError extends LsyncError {
  constructor(pattern: string, why: string) {
    super('EXCLUDE_INVALID', `the pattern ${pattern} is not valid: ${why}`, {
      hint: 'see `lsync snapshot create --help`',
    })
  }
}

/** A pattern, ready to be asked. */
export interface Pattern {
  readonly isNegated: boolean
  readonly isAnchored: boolean
  /** `undefined` stands for `**`: any number of components. */
  readonly parts: readonly (RegExp | undefined)[]
}

/**
 * Patterns of the form that restic's `--exclude` has: `*`, `?`, `[a-z]` within a component, `**` for any number of
 * components, a leading `/` for the root, a leading `!` for an exception to those before it.
 * @throws {PatternInvalidError}
 */
export function parsePatterns(patterns: readonly string[]): Pattern[] {
  return patterns.map((pattern) => {
    const isNegated = pattern.startsWith('!')
    const body = (isNegated ? pattern.slice(1) : pattern).replace(/\/+$/, '')
    if (body === '') throw new PatternInvalidError(pattern, 'it is empty')
    const parts = body
      .split('/')
      .filter((part) => part !== '')
      .map((part) => (part === '**' ? undefined : componentPattern(part, pattern)))
    return { isNegated, isAnchored: body.startsWith('/'), parts }
  })
}

function componentPattern(part: string, whole: string): RegExp {
  let source = ''
  for (let at = 0; at < part.length; at++) {
    const unit = part[at] as string
    if (unit === '*') source += '.*'
    else if (unit === '?') source += '.'
    else if (unit === '[') {
      const end = part.indexOf(']', at + 2)
      if (end < 0) throw new PatternInvalidError(whole, 'a [ has no ]')
      const body = part.slice(at + 1, end)
      source += `[${body.startsWith('^') ? '^' : ''}${body.replace(/^\^/, '').replace(/[\\[\]^]/g, '\\$&')}]`
      at = end
    } else {
      const isEscape = unit === '\\' && at + 1 < part.length
      if (isEscape) at++
      source += (part[at] as string).replace(/[$()*+.?[\\\]^{|}/]/g, '\\$&')
    }
  }
  try {
    return new RegExp(`^${source}$`, 'su')
  } catch {
    throw new PatternInvalidError(whole, 'a range in it is not one')
  }
}

/** Whether a path (absolute, bytes) or something above it is meant. The last pattern that says something decides. */
export function isMatched(patterns: readonly Pattern[], path: ByteString): boolean {
  if (patterns.length === 0) return false
  const components = textOf(path)
    .split('/')
    .filter((part) => part !== '')
  let matched = false
  for (const pattern of patterns) {
    if (pattern.isNegated === matched && matchesPath(pattern, components)) matched = !pattern.isNegated
  }
  return matched
}

function matchesPath({ parts, isAnchored }: Pattern, components: readonly string[]): boolean {
  for (let from = 0; from < components.length; from++) {
    if (matchesFrom(parts, 0, components, from)) return true
    if (isAnchored) return false
  }
  return false
}

function matchesFrom(
  parts: readonly (RegExp | undefined)[],
  part: number,
  components: readonly string[],
  at: number,
): boolean {
  // What lies beneath a match is matched, too.
  if (part === parts.length) return true
  const pattern = parts[part]
  if (pattern === undefined) {
    for (let next = at; next <= components.length; next++) {
      if (matchesFrom(parts, part + 1, components, next) && (part + 1 < parts.length || next > at)) return true
    }
    return false
  }
  const component = components[at]
  return component !== undefined && pattern.test(component) && matchesFrom(parts, part + 1, components, at + 1)
}
