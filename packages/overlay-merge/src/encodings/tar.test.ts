import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { expect, test } from 'vitest'
import type { Spool } from './spool.ts'
import { readTarLayer } from './tar.ts'
import { encodeHeader } from './tar-header.ts'

const CHUNK_BYTES = 1 << 20
const CHUNKS = 200

const drain: Spool = {
  async put(_number, _member, body) {
    for await (const _ of body);
  },
  dataOf: () => ({}),
}

test('an archive that can be stopped is not held in memory while it is read', async () => {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  const heldBytes = () => {
    collect()
    return process.memoryUsage().arrayBuffers
  }
  const before = heldBytes()
  let after = 0
  async function* archive() {
    yield encodeHeader({ type: '0', name: 'large', sizeBytes: CHUNKS * CHUNK_BYTES, mode: 0o644 })
    for (let i = 0; i < CHUNKS; i++) yield Buffer.alloc(CHUNK_BYTES)
    after = heldBytes()
    yield Buffer.alloc(1024)
  }
  const { signal } = new AbortController()
  await readTarLayer(archive(), { form: 'plain', spool: drain, signal })
  expect(after - before).toBeLessThan((CHUNKS * CHUNK_BYTES) / 4)
})

test('reading ends with the signal, also while nothing comes', async () => {
  const controller = new AbortController()
  async function* silent() {
    yield encodeHeader({ type: '0', name: 'large', sizeBytes: 1000, mode: 0o644 })
    setImmediate(() => controller.abort(new Error('stopped')))
    await new Promise(() => undefined)
  }
  const reading = readTarLayer(silent(), { form: 'plain', spool: drain, signal: controller.signal })
  await expect(reading).rejects.toThrow('stopped')
})
