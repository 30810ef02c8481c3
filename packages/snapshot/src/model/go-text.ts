import { type ByteString, bytesOf, textOf } from '@lsync/posix'

// The format was first written by a Go program, and its ids are hashes of text: what this writes has to be the same text.

const SHORT: Readonly<Record<string, string>> = {
  '\x07': '\\a',
  '\b': '\\b',
  '\f': '\\f',
  '\n': '\\n',
  '\r': '\\r',
  '\t': '\\t',
  '\v': '\\v',
  '\\': '\\\\',
  '"': '\\"',
}
const PLAIN = /^[ !#-[\]-~]*$/
const PRINTABLE = /^[\p{L}\p{M}\p{N}\p{P}\p{S} ]$/u
const hex = (code: number, digits: number) => code.toString(16).padStart(digits, '0')

/** A name as trees have it: as Go's `strconv.Quote` without the quotes. Bytes that are not UTF-8 become `\xff`. */
export function quoteName(name: ByteString): string {
  if (PLAIN.test(name)) return name
  let quoted = ''
  for (const character of textOf(name)) {
    const code = character.codePointAt(0) as number
    const short = SHORT[character]
    if (short !== undefined) quoted += short
    else if (code >= 0xdc80 && code <= 0xdcff) quoted += `\\x${hex(code - 0xdc00, 2)}`
    else if (PRINTABLE.test(character)) quoted += character
    else if (code < 0x20 || code === 0x7f) quoted += `\\x${hex(code, 2)}`
    else quoted += code < 0x10000 ? `\\u${hex(code, 4)}` : `\\U${hex(code, 8)}`
  }
  return quoted
}

const LONG = new Map(Object.entries(SHORT).map(([character, short]) => [short, character]))
const ESCAPE = /\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-3][0-7]{2})|[abfnrtv\\"])/y

/** The bytes of a quoted name; `undefined` when it is not one. */
export function unquoteName(quoted: string): ByteString | undefined {
  if (PLAIN.test(quoted)) return quoted as ByteString
  let bytes = ''
  for (let at = 0; at < quoted.length; ) {
    if (quoted[at] !== '\\') {
      let end = quoted.indexOf('\\', at)
      if (end < 0) end = quoted.length
      const plain = quoted.slice(at, end)
      if (/["\n]/.test(plain) || !plain.isWellFormed()) return undefined
      bytes += bytesOf(plain)
      at = end
      continue
    }
    ESCAPE.lastIndex = at
    const found = ESCAPE.exec(quoted)
    if (found === null) return undefined
    const [whole, byte, short, long, octal] = found
    const code = Number.parseInt(short ?? long ?? '0', 16)
    if (byte !== undefined) bytes += String.fromCharCode(Number.parseInt(byte, 16))
    else if (octal !== undefined) bytes += String.fromCharCode(Number.parseInt(octal, 8))
    else if (short === undefined && long === undefined) bytes += LONG.get(whole) as string
    else if (code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return undefined
    else bytes += bytesOf(String.fromCodePoint(code))
    at += whole.length
  }
  return bytes as ByteString
}

const SIMPLE_TEXT = /^[ !#-%'-;=?-[\]-~]*$/

/** A string as Go's `encoding/json` writes it: also `<`, `>`, `&` and two line separators are escaped. */
export function jsonText(text: string): string {
  if (SIMPLE_TEXT.test(text)) return `"${text}"`
  return (
    JSON.stringify(text)
      .replace(/[<>&\u2028\u2029\x7f]/g, (unit) => (unit === '\x7f' ? unit : `\\u${hex(unit.charCodeAt(0), 4)}`))
      // Escape by escape, since the second half of an escaped backslash begins none.
      .replace(/\\./g, (pair) => (pair === '\\b' ? '\\u0008' : pair === '\\f' ? '\\u000c' : pair))
  )
}

const SECOND_NS = 1_000_000_000n
const YEAR_0 = -62_167_219_200n
const YEAR_10000 = 253_402_300_800n
const QUARTER_S = 900
const YEARS_400_S = 12_622_780_800
let zoneQuarter = Number.NaN
let zoneMinutes = 0
let zoneText = 'Z'
let lastSecond = Number.NaN
let lastText = ''
const ZERO = 0x30

/**
 * A time (ns since 1970) as Go's RFC3339Nano writes it, in the local time zone. Years before 0 and after 9999 cannot be
 * written; the nearest that can stands for them.
 */
export function formatTime(timeNs: bigint): string {
  let seconds = timeNs / SECOND_NS
  let fraction = timeNs % SECOND_NS
  if (fraction < 0n) {
    seconds -= 1n
    fraction += SECOND_NS
  }
  // A day inside, so that no time zone leads out.
  if (seconds < YEAR_0 + 86_400n) [seconds, fraction] = [YEAR_0 + 86_400n, 0n]
  else if (seconds >= YEAR_10000 - 86_400n) [seconds, fraction] = [YEAR_10000 - 86_401n, 0n]
  return formatParts(Number(seconds), Number(fraction))
}

/** As `formatTime`, of whole seconds of the years 1 to 9998 and the ns of the second. */
export function formatParts(second: number, ns: number): string {
  if (second !== lastSecond) {
    const quarter = Math.floor(second / QUARTER_S)
    // Offsets change at full quarters of an hour only.
    if (quarter !== zoneQuarter) {
      zoneQuarter = quarter
      zoneMinutes = -new Date(second * 1000).getTimezoneOffset()
      const size = Math.abs(zoneMinutes)
      const clock = `${String(Math.floor(size / 60)).padStart(2, '0')}:${String(size % 60).padStart(2, '0')}`
      zoneText = zoneMinutes === 0 ? 'Z' : `${zoneMinutes < 0 ? '-' : '+'}${clock}`
    }
    lastSecond = second
    lastText = new Date((second + zoneMinutes * 60) * 1000).toISOString().slice(0, 19)
  }
  if (ns === 0) return lastText + zoneText
  const digits = String(ns + 1_000_000_000)
  let end = 10
  while (digits.charCodeAt(end - 1) === ZERO) end--
  return `${lastText}.${digits.slice(1, end)}${zoneText}`
}

const TIME = /^(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9})\d*)?(?:Z|([+-])(\d\d):(\d\d))$/

const TO_SECOND = 19
const POINT = 0x2e
let parsedSecond = ''
let parsedZone = ''
let parsedS = 0n

/** The ns since 1970 of an RFC 3339 time; `undefined` when it is none. */
export function parseTime(text: string): bigint | undefined {
  // Files come in groups of the same second.
  if (parsedSecond !== '' && text.startsWith(parsedSecond)) {
    let ns = 0
    let at = TO_SECOND
    if (text.charCodeAt(at) === POINT) {
      let digits = 0
      for (at++; ; at++) {
        const digit = text.charCodeAt(at) - ZERO
        if (!(digit >= 0 && digit <= 9)) break
        if (digits < 9) ns = ns * 10 + digit
        digits++
      }
      if (digits === 0) return undefined
      for (; digits < 9; digits++) ns *= 10
    }
    if (text.length === at + parsedZone.length && text.endsWith(parsedZone)) return parsedS * SECOND_NS + BigInt(ns)
  }
  const found = TIME.exec(text)
  if (found === null) return undefined
  const [, year, month, day, hour, minute, second, fraction = '', sign, zoneHours = '0', zoneMinutes = '0'] = found
  // Date.UTC takes years below 100 for those of the last century; 400 years later the calendar is the same.
  const ms = Date.UTC(Number(year) + 400, Number(month) - 1, Number(day), Number(hour), Number(minute), Number(second))
  const offset = (Number(zoneHours) * 60 + Number(zoneMinutes)) * 60 * (sign === '-' ? -1 : 1)
  parsedSecond = text.slice(0, TO_SECOND)
  parsedZone = sign === undefined ? 'Z' : text.slice(-'+00:00'.length)
  parsedS = BigInt(ms / 1000 - YEARS_400_S - offset)
  return parsedS * SECOND_NS + BigInt(fraction.padEnd(9, '0'))
}

/** Whether a text is a time that `parseTime` reads. */
export function isTime(text: string): boolean {
  return TIME.test(text)
}

/** Whether two written times are the same moment. */
export function isSameTime(left: string, right: string): boolean {
  return left === right || parseTime(left) === parseTime(right)
}
