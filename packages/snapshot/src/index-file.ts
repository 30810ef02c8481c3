import { LsyncError } from '@lsync/posix'
import { isId, type ObjectId } from './model/tree.ts'
import { type PackedObject, parseObject, visitHeader } from './pack.ts'

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
  const texts = packs.map(({ id, objects }) => `{"id":"${id}","blobs":[${objects.map(objectText).join(',')}]}`)
  return Buffer.from(`{"packs":[${texts.join(',')}]}`)
}

/** As `encodeIndex`, of packs by their plain headers. */
export function encodeIndexOfHeaders(packs: readonly { readonly id: ObjectId; readonly header: Buffer }[]): Buffer {
  const texts = packs.map(({ id, header }) => {
    const ids = header.toString('hex')
    const objects: string[] = []
    visitHeader(header, (kind, offset, length, uncompressedLength, idAt) => {
      objects.push(objectText({ id: ids.slice(idAt * 2, (idAt + 32) * 2), kind, offset, length, uncompressedLength }))
    })
    return `{"id":"${id}","blobs":[${objects.join(',')}]}`
  })
  return Buffer.from(`{"packs":[${texts.join(',')}]}`)
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
