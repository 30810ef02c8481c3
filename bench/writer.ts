import { closeSync, openSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'

// Makes so many small files a second in a directory, for so many seconds, each named after the microsecond of its making.
const [directory = '', perSecond = '1000', seconds = '10'] = process.argv.slice(2)
const content = Buffer.alloc(1800, 'x')
const startedAt = performance.now()
const total = Number(perSecond) * Number(seconds)
for (let made = 0; made < total; ) {
  const due = Math.min(total, Math.floor(((performance.now() - startedAt) / 1000) * Number(perSecond)))
  for (; made < due; made++) {
    const name = String(Math.round((performance.timeOrigin + performance.now()) * 1000))
    try {
      const file = openSync(join(directory, name), 'wx')
      writeSync(file, content)
      closeSync(file)
    } catch (error) {
      // Two in one microsecond.
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
    }
  }
  await delay(5)
}
