import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import {
  CachedLayer,
  CacheRecord,
  ErrorsRecord,
  HooksRecord,
  LayerRecord,
  LeaseClaim,
  MountedRecord,
  NodeRecord,
  NodeRootRecord,
  PoliciesRecord,
  RootRecord,
  SolidifyRecord,
  SwitchRecord,
  VersionRecord,
} from '@lsync/container-root'
import { expect, test } from 'vitest'

const root = fileURLToPath(new URL('../..', import.meta.url))
const page = readFileSync(`${root}/docs/format.md`, 'utf8')

/** What is written to disk as JSON: the file of its types, and those of them that count (all, by default). */
const WRITTEN: readonly { file: string; only?: readonly string[] }[] = [
  { file: 'packages/overlay-merge/src/model/plan.ts' },
  { file: 'packages/overlay-merge/src/vacuum.ts', only: ['JournalHeader', 'DropLine'] },
  { file: 'packages/overlay-merge/src/encodings/portable.ts', only: ['Line'] },
  { file: 'packages/snapshot/src/oci/import.ts', only: ['ImageRecord', 'ImageRecordLayer'] },
]

/** The interfaces of a source file with their own fields, in the order in which they stand. */
function interfacesOf(source: string): [name: string, fields: string[]][] {
  const declaration = /^(?:export )?interface (\w+)(?: extends \w+)? \{\n([\s\S]*?)\n\}/gm
  return [...source.matchAll(declaration)].map(([, name = '', body = '']) => [
    name,
    [...body.matchAll(/^ {2}(?:readonly )?(\w+)\??:/gm)].map(([, field]) => field as string),
  ])
}

/** The fields that the section of an interface explains: the first column of its table. */
function explained(name: string): string[] {
  const [, section = ''] = new RegExp(`^### \`${name}\`\\n([\\s\\S]*?)(?=^##|$(?![\\s\\S]))`, 'm').exec(page) ?? []
  return [...section.matchAll(/^\| `(\w+)` \|/gm)].map(([, field]) => field as string)
}

const written = WRITTEN.flatMap(({ file, only }) =>
  interfacesOf(readFileSync(`${root}/${file}`, 'utf8')).filter(([name]) => only?.includes(name) ?? true),
)

test('the types that are written to disk are found', () => {
  expect(written.map(([name]) => name)).toEqual(
    expect.arrayContaining(['PlanHeader', 'DirectoryRecord', 'StepBase', 'JournalHeader', 'DropLine', 'Line']),
  )
})

test.each(written)('docs/format.md explains each field of %s, and no other', (name, fields) => {
  expect(fields.length).toBeGreaterThan(0)
  expect(explained(name).sort()).toEqual([...fields].sort())
})

test.each(
  Object.entries({
    ErrorsRecord,
    CacheRecord,
    CachedLayer,
    HooksRecord,
    LayerRecord,
    LeaseClaim,
    MountedRecord,
    NodeRecord,
    NodeRootRecord,
    PoliciesRecord,
    RootRecord,
    SolidifyRecord,
    SwitchRecord,
    VersionRecord,
  }),
)('docs/format.md explains each field of %s, and no other', (name, shape) => {
  expect(explained(name).sort()).toEqual(Object.keys(shape.shape).sort())
})
