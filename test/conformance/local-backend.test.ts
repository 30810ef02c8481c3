import { mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { hostPath } from '@lsync/posix'
import { LocalBackend } from '@lsync/snapshot'
import { expect, onTestFinished, test } from 'vitest'
import { describeBackend } from './backend.ts'

function temporaryDirectory(): string {
  return mkdtempSync('/dev/shm/lsync-backend-')
}

describeBackend('a repository in a directory', () => {
  const directory = temporaryDirectory()
  const open = async () => new LocalBackend(hostPath(`${directory}/repository`))
  return { open, reopen: open, cleanUp: async () => rmSync(directory, { recursive: true }) }
})

function emptyPlace() {
  const directory = temporaryDirectory()
  onTestFinished(() => rmSync(directory, { recursive: true }))
  return { directory, backend: new LocalBackend(hostPath(directory)) }
}

const name = 'ab'.padEnd(64, '0')

test('files are private, as are their directories', async () => {
  const { directory, backend } = emptyPlace()
  await backend.create()
  await backend.put({ kind: 'pack', name }, Buffer.from('x'))
  expect(statSync(`${directory}/data/ab/${name}`).mode & 0o777).toBe(0o400)
  expect(statSync(`${directory}/data/ab`).mode & 0o777).toBe(0o700)
})

test('nothing is left beside a file that was put', async () => {
  const { directory, backend } = emptyPlace()
  await backend.create()
  await backend.put({ kind: 'key', name }, Buffer.from('x'))
  expect(readdirSync(`${directory}/keys`)).toEqual([name])
})

test('a put that fails leaves nothing behind', async () => {
  const { directory, backend } = emptyPlace()
  await backend.create()
  // A directory of that name cannot be replaced by a file.
  mkdirSync(`${directory}/index/${name}/x`, { recursive: true })
  await expect(backend.put({ kind: 'index', name }, Buffer.from('x'))).rejects.toMatchObject({ code: 'EISDIR' })
  expect(readdirSync(`${directory}/index`)).toEqual([name])
})

test('the folder of a pack is made when it is missing', async () => {
  const { directory, backend } = emptyPlace()
  await backend.put({ kind: 'pack', name }, Buffer.from('x'))
  expect(readdirSync(`${directory}/data/ab`)).toEqual([name])
})

test('what others leave in the directories is not listed', async () => {
  const { directory, backend } = emptyPlace()
  await backend.create()
  writeFileSync(`${directory}/index/${name}-tmp-123`, 'x')
  writeFileSync(`${directory}/data/README`, 'x')
  const names: string[] = []
  for await (const { name } of backend.list('index')) names.push(name)
  for await (const { name } of backend.list('pack')) names.push(name)
  expect(names).toEqual([])
})
