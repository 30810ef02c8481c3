import { memoryOver } from '@lsync/posix'
import { type CipherKey, createEngine, type Engine } from './crypto/engine.ts'
import { hashOf, openBytes } from './crypto/sealer.ts'
import type { ObjectId } from './model/tree.ts'
import { isPlausible, type PackedObject, readPackHeader } from './pack.ts'
import type { Doer } from './thread-pool.ts'

export interface CheckInit {
  readonly key: CipherKey
}

/** A pack that was read as a whole. */
export interface CheckJob {
  readonly packId: ObjectId
  readonly content: ArrayBuffer
  /** What the index says of it; absent: whatever its own header says. */
  readonly objects?: readonly PackedObject[]
}

/** What is wrong with a pack. */
export interface CheckResult {
  readonly why: readonly string[]
  /** Objects that are not what their ids say, or not there. */
  readonly damaged: readonly PackedObject[]
  /** Those that are. */
  readonly whole: readonly PackedObject[]
}

/** Reads packs to the last byte. */
export class PackChecker implements Doer<CheckJob, CheckResult> {
  readonly #engine: Engine

  constructor({ key }: CheckInit) {
    const { encrypt, macK, macR } = key
    this.#engine = createEngine({ encrypt: Buffer.from(encrypt), macK: Buffer.from(macK), macR: Buffer.from(macR) })
  }

  close(): void {
    this.#engine.close()
  }

  async run({ packId, content, objects }: CheckJob): Promise<CheckResult> {
    const bytes = Buffer.from(content)
    const why: string[] = []
    if (hashOf(bytes) !== packId) why.push('its content is not what its name says')
    let header: PackedObject[] | undefined
    try {
      const read = async (offset: number, length: number) => bytes.subarray(offset, offset + length)
      header = await readPackHeader(packId, bytes.length, read, (sealed) => openBytes(this.#engine, sealed))
    } catch (error) {
      why.push((error as Error).message)
    }
    if (header !== undefined && objects !== undefined && !isSameList(header, objects)) {
      why.push('its header is not what the index says')
    }
    const damaged: PackedObject[] = []
    const whole: PackedObject[] = []
    for (const object of objects ?? header ?? []) (this.#isWhole(bytes, object) ? whole : damaged).push(object)
    if (damaged.length > 0) why.push(`${damaged.length} of its ${whole.length + damaged.length} objects are damaged`)
    return { why, damaged, whole }
  }

  #isWhole(pack: Buffer, object: PackedObject): boolean {
    const { id, offset, length, uncompressedLength } = object
    if (!isPlausible(object) || offset + length > pack.length) return false
    const plain = openBytes(this.#engine, pack.subarray(offset, offset + length))
    if (plain === undefined) return false
    if (uncompressedLength === undefined) return hashOf(plain) === id
    const source = memoryOver(plain.buffer as ArrayBuffer)
    const target = memoryOver(new ArrayBuffer(Math.max(1, uncompressedLength)))
    const size = this.#engine.decompress(source, plain.byteOffset, plain.length, target, 0, uncompressedLength)
    return size === uncompressedLength && hashOf(target.buffer.subarray(0, size)) === id
  }
}

function isSameList(left: readonly PackedObject[], right: readonly PackedObject[]): boolean {
  const textOf = ({ kind, id, offset, length, uncompressedLength }: PackedObject) =>
    `${kind} ${id} ${offset} ${length} ${uncompressedLength}`
  const texts = new Set(left.map(textOf))
  return left.length === right.length && right.every((object) => texts.has(textOf(object)))
}
