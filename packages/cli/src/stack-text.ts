import type { HostPath } from '@lsync/posix'
import { InvalidArgumentError } from 'commander'

/** Layers, top first, as on a mount. */
export interface StackText {
  readonly layers: readonly string[]
  /** Data-only lowers: what comes after `::`. */
  readonly data: readonly string[]
}

/**
 * Splits `U:L1:L2` or `U:L1::D1` at its colons. As in mount options, a backslash takes the next character as it is.
 * @throws {InvalidArgumentError} on an empty layer, or a layer after the data-only ones
 */
export function splitStack(text: string): StackText {
  const parts: string[] = []
  let part = ''
  for (let i = 0; i < text.length; i++) {
    if (text[i] === '\\' && i + 1 < text.length) part += text[++i]
    else if (text[i] === ':') {
      parts.push(part)
      part = ''
    } else part += text[i]
  }
  parts.push(part)
  // An empty part is what lies between the two colons before a data-only layer.
  const firstData = parts.indexOf('')
  const layers = firstData < 0 ? parts : parts.slice(0, firstData)
  const data = firstData < 0 ? [] : parts.slice(firstData).filter((_, index) => index % 2 === 1)
  const between = firstData < 0 ? [] : parts.slice(firstData).filter((_, index) => index % 2 === 0)
  if (layers.length === 0 || data.includes('') || between.some((gap) => gap !== '') || between.length !== data.length) {
    throw new InvalidArgumentError('Expected UPPER:LOWER…, with data-only layers as ::DATA at the end.')
  }
  return { layers, data }
}

/** A layer's path as one part of such a text. */
export function stackPart(path: HostPath | string): string {
  return path.replace(/[\\:]/g, '\\$&')
}
