import { existsSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { freshDirectory, jsonLines, lsync, startLsync } from './lsync.ts'

const FILES = 20_000

function manyChanges(): string {
  const directory = freshDirectory()
  for (const name of ['up', 'low']) mkdirSync(`${directory}/${name}`)
  for (let index = 0; index < FILES; index++) {
    const parent = `${index % 200}`
    if (index < 200) for (const layer of ['up', 'low']) mkdirSync(`${directory}/${layer}/${parent}`)
    writeFileSync(`${directory}/up/${parent}/${index}`, '')
    if (index % 2 === 0) writeFileSync(`${directory}/low/${parent}/${index}`, '')
  }
  return directory
}

function filesIn(path: string): number {
  return readdirSync(path, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile()).length
}

test.each(['SIGINT', 'SIGTERM'] as const)(
  '%s ends a merge with 130, and recover brings the old view or the new one',
  async (signal) => {
    const directory = manyChanges()
    const [upper, lower] = [`${directory}/up`, `${directory}/low`]
    const args = ['merge', '--upper', upper, '--lower', lower, '--in-place', '--yes', '--namespace', 'user']
    const { child, ended } = startLsync(args)
    // The journal is there from the first step to the last.
    while (!existsSync(`${directory}/.lsync.low/plan`) && child.exitCode === null) await sleep(1)
    child.kill(signal)
    const { stdout, stderr, code } = await ended
    expect({ stdout, code }).toEqual({ stdout: '', code: 130 })
    expect(stderr).toBe(
      `lsync: stopped by ${signal}; \`lsync recover DIR\` finishes or rolls back what had begun on DIR (INTERRUPTED)\n`,
    )
    const recovered = lsync(['recover', lower, '--json'])
    expect(recovered).toMatchObject({ stderr: '', code: 0 })
    const [{ outcome }] = jsonLines(recovered.stdout) as [{ outcome: string }]
    expect(filesIn(lower)).toBe(outcome === 'finished' ? FILES : FILES / 2)
    expect(filesIn(upper)).toBe(outcome === 'finished' ? 0 : FILES)
    expect(readdirSync(directory).sort()).toEqual(['low', 'up'])
  },
)

test('SIGINT ends a snapshot with 130 and without a lock, and the next one has what was stored', async () => {
  const directory = manyChanges()
  const env = { LSYNC_PASSWORD: 'secret', LSYNC_REPOSITORY: `${directory}/repository` }
  expect(lsync(['snapshot', 'init'], { env })).toMatchObject({ code: 0 })
  const { child, ended } = startLsync(['snapshot', 'create', `${directory}/up`], { env })
  while (readdirSync(`${directory}/repository/locks`).length === 0 && child.exitCode === null) await sleep(1)
  child.kill('SIGINT')
  expect(await ended).toEqual({
    stdout: '',
    stderr:
      'lsync: stopped by SIGINT; run it again: what is there already is not stored or restored once more (INTERRUPTED)\n',
    code: 130,
  })
  expect(readdirSync(`${directory}/repository/locks`)).toEqual([])
  expect(lsync(['snapshot', 'create', `${directory}/up`], { env })).toMatchObject({ stderr: '', code: 0 })
  expect(lsync(['snapshot', 'check', '--read-data'], { env })).toMatchObject({ code: 0 })
})

test('a reader that goes away ends lsync quietly', async () => {
  const directory = manyChanges()
  const { child, ended } = startLsync([
    'diff',
    '--upper',
    `${directory}/up`,
    '--lower',
    `${directory}/low`,
    '--namespace',
    'user',
  ])
  child.stdout?.once('data', () => child.stdout?.destroy())
  expect(await ended).toMatchObject({ stderr: '', code: 130 })
})
