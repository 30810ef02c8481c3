// Run as a process of its own, to be killed: `node merge-child.ts '{"upper":…}'`. Says `ready` when it begins.
import { writeSync } from 'node:fs'
import { engine, type MergeCase } from './engine.ts'

const request = JSON.parse(process.argv[2] as string) as MergeCase
writeSync(1, 'ready\n')
await engine.merge(request)
