import { LsyncError } from '@lsync/posix'
import { isId, type ObjectId } from './model/tree.ts'
import { isPlausible, type PackedObject, parseObject, visitHeader } from './pack.ts'

/** A pack as an index has it. */
export interface IndexedPack {
  readonly id: ObjectId
  readonly objects: readonly PackedObject[]
}

/** Index files hold at most about so many objects, which is some 3 MB compressed. Source: restic's own limit. */
export const INDEX_OBJECTS = 50_000

/** An index file that makes no sense. */
export class IndexInvalidError extends LsyncError {
  constructor(indexId: ObjectId, why: string) {
    super('INDEX_INVALID', `index ${indexId.slice(0, 8)} is not valid: ${why}`, {
      path: indexId,
      hint: '`lsync snapshot repair index` makes it again from the packs',
    })
  }
}

/** The JSON of an index file. Source: restic's design document, "Indexing". */
export function encodeIndex(packs: readonly IndexedPack[]): Buffer {
  const texts = packs.map(({ id, objects }) => packOf(id, objects.map(objectText)))
  return Buffer.from(`{"packs":[${texts.join(',')}]}`)
}

/** What an index has of a pack, by its plain header: see `indexOfTexts`. */
export function packText(id: ObjectId, header: Buffer): Buffer {
  const ids = header.toString('hex')
  const objects: string[] = []
  visitHeader(header, (kind, offset, length, uncompressedLength, idAt) => {
    objects.push(objectText({ id: ids.slice(idAt * 2, (idAt + 32) * 2), kind, offset, length, uncompressedLength }))
  })
  return Buffer.from(packOf(id, objects), 'latin1')
}

/** As `encodeIndex`, of what `packText` made of each pack. */
export function indexOfTexts(texts: readonly Buffer[]): Buffer {
  const comma = Buffer.from(',')
  const list = texts.flatMap((text, i) => (i === 0 ? [text] : [comma, text]))
  return Buffer.concat([Buffer.from('{"packs":['), ...list, Buffer.from(']}')])
}

function packOf(id: ObjectId, objects: readonly string[]): string {
  return `{"id":"${id}","blobs":[${objects.join(',')}]}`
}

function objectText({ id, kind, offset, length, uncompressedLength }: PackedObject): string {
  const size = uncompressedLength === undefined ? '' : `,"uncompressed_length":${uncompressedLength}`
  return `{"id":"${id}","type":"${kind}","offset":${offset},"length":${length}${size}}`
}

/**
 * The packs of an index file.
 * @throws {IndexInvalidError} also for lengths that no object can have
 */
export function decodeIndex(indexId: ObjectId, content: Buffer): IndexedPack[] {
  let raw: unknown
  try {
    raw = JSON.parse(content.toString())
  } catch {
    throw new IndexInvalidError(indexId, 'it is not JSON')
  }
  // The first version of the format had a list without a name.
  const list = Array.isArray(raw) ? raw : (raw as { packs?: unknown } | null)?.packs
  if (list === null) return []
  if (!Array.isArray(list)) throw new IndexInvalidError(indexId, 'it has no list of packs')
  return list.map((item: unknown) => {
    const { id, blobs } = (item ?? {}) as { id?: unknown; blobs?: unknown }
    if (!isId(id) || !Array.isArray(blobs)) throw new IndexInvalidError(indexId, 'a pack in it is none')
    const objects = blobs.map((blob: unknown) => {
      const object = parseObject(blob)
      if (object === undefined) throw new IndexInvalidError(indexId, 'an object in it is none')
      return object
    })
    return { id, objects }
  })
}

/** Objects as rows of `ROW_WORDS` words: eight of the id, kind (0 data, 1 tree), offset, length, uncompressed length (-1: none). */
export interface IndexRows {
  readonly packs: readonly { readonly id: ObjectId; readonly objects: number }[]
  readonly words: Int32Array
}

export const ROW_WORDS = 12

const ascii = (text: string) => Uint8Array.from(Buffer.from(text))
const HEAD = ascii('{"packs":[')
const PACK = ascii('{"id":"')
const OBJECTS = ascii('","blobs":[')
const OBJECT = ascii('{"id":"')
const DATA = ascii('","type":"data","offset":')
const TREE = ascii('","type":"tree","offset":')
const LENGTH = ascii(',"length":')
const UNCOMPRESSED = ascii(',"uncompressed_length":')
const COMMA = 0x2c
const CLOSE_LIST = 0x5d
const CLOSE_OBJECT = 0x7d
const NO_DIGIT = 16
const HEX = new Uint8Array(256).fill(NO_DIGIT)
for (const [value, digit] of [...'0123456789abcdef'].entries()) HEX[digit.charCodeAt(0)] = value
// The shortest object: `{"id":"…","type":"data","offset":0,"length":38},`.
const SHORTEST_OBJECT_BYTES = 110

/**
 * The objects of an index file in the very form that `encodeIndex` and restic write, without an object of the heap for each:
 * a third of `decodeIndex`'s time. `undefined` when anything is otherwise, which then is for `decodeIndex` to judge.
 */
export function scanIndex(content: Buffer): IndexRows | undefined {
  const words = new Int32Array(Math.ceil(content.length / SHORTEST_OBJECT_BYTES) * ROW_WORDS)
  const packs: { id: ObjectId; objects: number }[] = []
  let at = 0
  let row = 0
  const takes = (text: Uint8Array): boolean => {
    for (let i = 0; i < text.length; i++) if (content[at + i] !== text[i]) return false
    at += text.length
    return true
  }
  /** Up to nine digits; -1 when there are none, or more. */
  const takeNumber = (): number => {
    let value = 0
    const first = at
    for (; at - first < 10; at++) {
      const digit = (content[at] as number) - 0x30
      if (!(digit >= 0 && digit <= 9)) break
      value = value * 10 + digit
    }
    return at === first || at - first > 9 ? -1 : value
  }
  const takeId = (to: number): boolean => {
    let seen = 0
    for (let word = 0; word < 8; word++) {
      let value = 0
      for (let byte = 0; byte < 4; byte++) {
        const high = HEX[content[at] as number] as number
        const low = HEX[content[at + 1] as number] as number
        seen |= high | low
        value |= ((high << 4) | low) << (byte * 8)
        at += 2
      }
      words[to + word] = value
    }
    return seen < NO_DIGIT
  }
  const takeObject = (): boolean => {
    if (row + ROW_WORDS > words.length || !takes(OBJECT) || !takeId(row)) return false
    const isTree = !takes(DATA)
    if (isTree && !takes(TREE)) return false
    const offset = takeNumber()
    if (offset < 0 || !takes(LENGTH)) return false
    const length = takeNumber()
    let uncompressedLength = -1
    if (takes(UNCOMPRESSED)) {
      uncompressedLength = takeNumber()
      if (uncompressedLength <= 0) return false
    }
    const kind = isTree ? 'tree' : 'data'
    const size = uncompressedLength < 0 ? undefined : uncompressedLength
    if (content[at++] !== CLOSE_OBJECT || !isPlausible({ kind, offset, length, uncompressedLength: size })) return false
    words[row + 8] = isTree ? 1 : 0
    words[row + 9] = offset
    words[row + 10] = length
    words[row + 11] = uncompressedLength
    row += ROW_WORDS
    return true
  }
  if (!takes(HEAD)) return undefined
  for (;;) {
    if (!takes(PACK)) return undefined
    const id = content.toString('latin1', at, at + 64)
    at += 64
    if (!isId(id) || !takes(OBJECTS)) return undefined
    const first = row
    do if (!takeObject()) return undefined
    while (content[at++] === COMMA)
    if (content[at - 1] !== CLOSE_LIST || content[at++] !== CLOSE_OBJECT) return undefined
    packs.push({ id, objects: (row - first) / ROW_WORDS })
    const next = content[at++]
    if (next === CLOSE_LIST) break
    if (next !== COMMA) return undefined
  }
  const isWhole = content[at++] === CLOSE_OBJECT && (at === content.length || content[at] === 0x0a)
  return isWhole && at + 1 >= content.length ? { packs, words } : undefined
}
