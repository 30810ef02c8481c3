import { PosixError } from './errors.ts'

declare const byteString: unique symbol

/**
 * A name or path as the kernel has it: bytes, no encoding. Held as a string in which every char code is one byte
 * (0–255), since such strings are compact, are Map keys, and compare with `<` in byte order.
 */
export type ByteString = string & { readonly [byteString]: true }

/** A path on the host, absolute or relative to the working directory, that the caller vouches for. */
export type HostPath = ByteString & { readonly host: true }

// Lone surrogates U+DC80–U+DCFF stand for bytes that are not UTF-8 (PEP 383), so that text round-trips.
const ESCAPE_BASE = 0xdc00
const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/**
 * The bytes of a text: UTF-8, and one byte for each escape that `textOf` made.
 * @throws {PosixError} EILSEQ on any other lone surrogate: it stands for no bytes, and U+FFFD would be another name
 */
export function bytesOf(text: string): ByteString {
  if (isAscii(text)) return text as ByteString
  let bytes = ''
  for (const character of text) {
    const code = character.codePointAt(0) as number
    if (code >= ESCAPE_BASE + 0x80 && code <= ESCAPE_BASE + 0xff) bytes += String.fromCharCode(code - ESCAPE_BASE)
    else if (code >= 0xd800 && code <= 0xdfff)
      throw new PosixError('EILSEQ', { syscall: 'path', path: escapedText(text) })
    else bytes += Buffer.from(character, 'utf8').toString('latin1')
  }
  return bytes as ByteString
}

/** A host path from text such as a command-line argument. */
export function hostPath(text: string): HostPath {
  return bytesOf(text) as HostPath
}

/**
 * Text for people and JSON: UTF-8 where the bytes are that, and a lone surrogate U+DC80–U+DCFF for every byte that
 * is not (PEP 383, as Python's `os.fsdecode`). `bytesOf` is its exact inverse.
 */
export function textOf(bytes: string): string {
  if (isAscii(bytes)) return bytes
  const buffer = Buffer.from(bytes, 'latin1')
  try {
    return decoder.decode(buffer)
  } catch {
    return escapeInvalid(buffer)
  }
}

function escapeInvalid(buffer: Buffer): string {
  let text = ''
  let at = 0
  while (at < buffer.length) {
    const length = validSequenceLength(buffer, at)
    if (length === 0) text += String.fromCharCode(ESCAPE_BASE + (buffer[at++] as number))
    else {
      text += buffer.toString('utf8', at, at + length)
      at += length
    }
  }
  return text
}

function validSequenceLength(buffer: Buffer, at: number): number {
  const lead = buffer[at] as number
  const length = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0
  if (length === 0 || at + length > buffer.length) return 0
  try {
    decoder.decode(buffer.subarray(at, at + length))
    return length
  } catch {
    return 0
  }
}

// For the error message alone: the text as ASCII, since it has no bytes.
function escapedText(text: string): string {
  return text.replace(/[^ -~]/g, (unit) => `<${unit.charCodeAt(0).toString(16)}>`)
}

function isAscii(text: string): boolean {
  for (let i = 0; i < text.length; i++) if (text.charCodeAt(i) > 0x7f) return false
  return true
}

/** One line for a terminal: control characters, backslashes and bytes that are not UTF-8 as `\n`, `\\`, `\xff`. */
export function printable(bytes: string): string {
  let out = ''
  for (const character of textOf(bytes)) {
    const code = character.codePointAt(0) as number
    if (code >= ESCAPE_BASE + 0x80 && code <= ESCAPE_BASE + 0xff) out += `\\x${(code - ESCAPE_BASE).toString(16)}`
    else if (character === '\\') out += '\\\\'
    else if (character === '\n') out += '\\n'
    else if (code < 0x20 || code === 0x7f) out += `\\x${code.toString(16).padStart(2, '0')}`
    // Direction overrides and other format characters could make one name look like another.
    else if (/\p{Cc}|\p{Cf}|\p{Zl}|\p{Zp}/u.test(character)) out += `\\u{${code.toString(16)}}`
    else out += character
  }
  return out
}
