import { globSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

// Holds the import directions of docs/decisions and the house style: what Biome cannot say.
const root = fileURLToPath(new URL('..', import.meta.url))

/** Rooms from the top of the house to the bottom; a package imports only from floors below its own. */
const FLOOR: Readonly<Record<string, number>> = {
  cli: 4,
  'container-root': 3,
  sync: 2,
  snapshot: 2,
  'overlay-merge': 1,
  ssh: 1,
  posix: 0,
}

/** Files that decide: they read and write nothing, so they import the model, and what is as pure as they are. */
const PURE: Readonly<Record<string, readonly string[]>> = {
  'packages/overlay-merge/src/compose.ts': [],
  'packages/sync/src/planner.ts': [],
}

/** Of posix, what works on bytes alone. */
const PURE_NAMES = new Set([
  'ByteString',
  'HostPath',
  'bytesOf',
  'hostPath',
  'printable',
  'textOf',
  'LsyncError',
  'Stat',
])

/** Dependencies that only some places may have: koffi reaches libc in posix, and OpenSSL and zstd in one folder. */
const ONLY_IN: Readonly<Record<string, readonly string[]>> = {
  ssh2: ['packages/ssh/'],
  koffi: ['packages/posix/', 'packages/snapshot/src/crypto/'],
}

interface Import {
  readonly from: string
  /** Names that are there at run time; `undefined` for all of them. */
  readonly names: readonly string[] | undefined
}

const problems: string[] = []

for (const file of globSync('packages/*/src/**/*.ts', { cwd: root }).sort()) {
  const source = readFileSync(join(root, file), 'utf8')
  for (const found of importsOf(source)) {
    const problem = checkImport(file, found)
    if (problem !== undefined) problems.push(`${file}: imports ${found.from}, but ${problem}`)
  }
  if (file.endsWith('/src/index.ts') && /^(?!export |\s|\}|$)/m.test(source)) {
    problems.push(`${file}: an index lists public names and holds no code`)
  }
}

function importsOf(source: string): Import[] {
  const imports: Import[] = []
  const statement = /^(?:import|export)\s+(type\s+)?(?:(\{[^}]*\}|\*(?:\s+as\s+\w+)?|\w+)\s+from\s+)?'([^']+)'/gm
  for (const [, isType, clause, from = ''] of source.matchAll(statement)) {
    imports.push({ from, names: isType === undefined ? namesOf(clause) : [] })
  }
  for (const [, from = ''] of source.matchAll(/\bimport\('([^']+)'\)/g)) imports.push({ from, names: undefined })
  return imports
}

function namesOf(clause: string | undefined): string[] | undefined {
  if (clause === undefined || !clause.startsWith('{')) return undefined
  const names = clause.slice(1, -1).split(',')
  return names
    .map((name) => name.trim().split(' as ')[0] ?? '')
    .filter((name) => name !== '' && !name.startsWith('type '))
}

function checkImport(file: string, { from, names }: Import): string | undefined {
  const own = file.split('/')[1] ?? ''
  const isTest = file.endsWith('.test.ts')
  const target = from.startsWith('.') ? relative(root, join(root, dirname(file), from)) : undefined
  const isSupport = isTest && target?.startsWith('test/')
  if (target !== undefined && !isSupport && !target.startsWith(`packages/${own}/`)) return 'it lies in another package'
  const [, other, deep] = /^@lsync\/([^/]+)(\/.*)?$/.exec(from) ?? []
  if (other !== undefined) {
    if (deep !== undefined) return 'other packages see only the index'
    if ((FLOOR[other] ?? 9) >= (FLOOR[own] ?? -1)) return `${own} stands below or beside ${other}`
  }
  const home = ONLY_IN[from]
  if (home !== undefined && !home.some((place) => file.startsWith(place))) return `only ${home.join(' and ')} may`
  if (isTest) return undefined
  const allowed = file.includes('/src/model/') ? [] : PURE[file]
  if (allowed === undefined || names?.length === 0) return undefined
  if (target !== undefined) {
    return target.includes('/src/model/') || allowed.includes(target)
      ? undefined
      : 'this file decides, and that one does not'
  }
  if (other === 'posix' && names?.every((name) => PURE_NAMES.has(name) || name.startsWith('S_IF'))) return undefined
  return 'this file decides, so it reads and writes nothing'
}

for (const problem of problems) console.error(problem)
process.exitCode = problems.length === 0 ? 0 : 1
