import { Worker } from 'node:worker_threads'
import { expect, test } from 'vitest'

test('a thread with a umask of its own makes files with the mode that is asked for, and the others keep theirs', async () => {
  const code = `
    const { parentPort } = require('node:worker_threads')
    const { readFileSync } = require('node:fs')
    const umask = (of) => /^Umask:\\s*(.*)$/m.exec(readFileSync('/proc/' + of + '/status', 'latin1'))[1]
    import(${JSON.stringify(new URL('./umask.ts', import.meta.url).href)}).then(({ takeOwnUmask }) => {
      const before = umask('thread-self')
      const isOwn = takeOwnUmask()
      parentPort.postMessage({ isOwn, before, after: umask('thread-self'), others: umask('self') })
    })`
  const worker = new Worker(code, { eval: true })
  const seen = await new Promise<Record<string, unknown>>((resolve, reject) => {
    worker.once('message', resolve)
    worker.once('error', reject)
  })
  await worker.terminate()
  expect(seen['before']).not.toBe('0000')
  expect(seen).toEqual({ isOwn: true, before: seen['before'], after: '0000', others: seen['before'] })
})
