import { closeSync, existsSync, readdirSync } from 'node:fs'
import {
  block,
  buildTree,
  type DirectorySpec,
  dir,
  fifo,
  file,
  linkTo,
  metacopy,
  opaque,
  redirected,
  removeTree,
  type Spec,
  socket,
  sparse,
  symlink,
  whiteout,
} from './build.ts'
import { engine, type MergeCase } from './engine.ts'
import { descriptorsBelow } from './image.ts'
import { describeError, shownAlone, viewOf } from './merging.ts'
import { type OverlayOptions, plainOptions } from './overlay.ts'
import { diffTrees, readTree, type Tree } from './tree.ts'

/** A merge that can be set up again and again, to be interrupted each time at another place. */
export interface Scenario {
  readonly name: string
  readonly mode: MergeCase['mode']
  readonly lowers: number
  readonly clone?: NonNullable<MergeCase['clone']>
}

export const scenarios: readonly Scenario[] = [
  { name: 'in place, one lower', mode: 'in-place', lowers: 1 },
  { name: 'in place, the lower stays a layer', mode: 'in-place', lowers: 2 },
  { name: 'new version by copy', mode: 'output', lowers: 1, clone: 'copy' },
  { name: 'new version by hard links', mode: 'output', lowers: 2, clone: 'hardlink' },
  { name: 'delta', mode: 'delta', lowers: 1 },
]

const options: OverlayOptions = { ...plainOptions, redirectDir: 'on', metacopy: true }

// One of everything that a plan can do, few of each: every step is a place to be killed at.
const layers: readonly DirectorySpec[] = [
  dir(
    {
      // Swapped directories, and a chain into a directory that is deleted otherwise.
      a: redirected('b', { fresh: file('fresh') }),
      b: redirected('a', { fb: whiteout() }),
      rescued: redirected('/gone/deep', { more: file('more') }),
      gone: whiteout(),
      file: file('new content', { mode: 0o4755, xattrs: { 'user.k': 'v', 'security.capability': capability() } }),
      'name\nwith \xff': file('bytes'),
      deleted: whiteout(),
      closed: opaque({ only: file('only', { flags: 'i' }) }, { mode: 0o700, flags: 'i' }),
      flagged: file('flagged', { flags: 'i' }),
      changed: dir({ kept2: file('2') }, { uid: 7, xattrs: { 'user.new': '1' } }),
      data: metacopy(9, { mode: 0o600, uid: 3 }),
      linked: file('one inode'),
      linked2: linkTo('linked'),
      turned: symlink('file'),
      link: dir({ inside: file('inside') }),
      node: fifo(),
      tree: dir({ of: dir({ new: dir({ s: socket(), b: block(7, 200) }) }) }),
      holes: sparse(200_000, [[131_072, 'x']]),
      alias1: file('changed alias'),
    },
    { mode: 0o750, gid: 9, flags: 'a' },
  ),
  dir({
    a: dir({ fa: file('fa') }),
    b: dir({ fb: file('fb'), sub: dir({ f: file('s') }) }),
    gone: dir({ deep: dir({ f: file('deep') }), lost: file('lost') }),
    file: file('old content'),
    deleted: file('deleted'),
    flagged: file('old flagged', { flags: 'a' }),
    'also flagged': linkTo('flagged'),
    closed: dir({ hidden: file('hidden') }),
    changed: dir({ kept: file('kept') }, { xattrs: { 'user.old': '1' } }),
    data: file('data bits'),
    turned: dir({ below: file('below') }),
    link: symlink('changed'),
    node: file('was a file'),
    untouched: dir({ f: file('untouched') }),
    alias1: file('alias'),
    alias2: linkTo('alias1'),
  }),
  dir({
    a: dir({ fa0: file('fa0') }),
    gone: dir({ deep: dir({ f0: file('f0') }) }),
    changed: dir({ below: file('below') }),
    bottom: file('bottom'),
  }),
]

/** The same, with many more of each, so that a merge takes long enough to be killed in its middle. */
export function manyTimes(count: number): readonly DirectorySpec[] {
  return layers.map((spec) => {
    const children = Object.fromEntries(
      Array.from({ length: count }, (_, n) => [`copy${n}`, inDirectory(spec, `copy${n}`)]),
    )
    return dir(children, { mode: spec.mode ?? 0o755 })
  })
}

/** One copy of the layer, in the directory to which its absolute redirect and its hard links have to lead. */
function inDirectory(spec: DirectorySpec, directory: string): DirectorySpec {
  const fix = (child: Spec): Spec => {
    if (child.kind === 'link') return linkTo(`${directory}/${child.to}`)
    const redirect = child.marks?.['redirect']
    return redirect?.startsWith('/')
      ? { ...child, marks: { ...child.marks, redirect: `/${directory}${redirect}` } }
      : child
  }
  return {
    ...spec,
    children: Object.fromEntries(Object.entries(spec.children).map(([name, child]) => [name, fix(child)])),
  }
}

function capability(): string {
  return '\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00'
}

/** One setting up of a scenario: its layers, what they show, and the request. */
export interface Attempt {
  readonly directory: string
  readonly request: MergeCase
  readonly view: Tree
  readonly raw: readonly Tree[]
  readonly paths: readonly string[]
}

export function setUp(directory: string, scenario: Scenario, specs: readonly DirectorySpec[] = layers): Attempt {
  const paths = specs.slice(0, scenario.lowers + 1).map((spec, index) => {
    const path = `${directory}/${index === 0 ? 'u' : `l${index}`}`
    buildTree(path, spec, { epoch: 1_600_000_000 + index * 50_000 })
    return path
  })
  const request: MergeCase = {
    upper: paths[0] as string,
    lowers: paths.slice(1),
    mode: scenario.mode,
    namespace: 'trusted',
    workers: 0,
    ...(scenario.mode === 'in-place' ? {} : { output: `${directory}/new` }),
    ...(scenario.clone === undefined ? {} : { clone: scenario.clone }),
  }
  return { directory, request, paths, view: show(directory, paths), raw: paths.map(readTree) }
}

function show(directory: string, paths: readonly string[]): Tree {
  return viewOf({ directory, layers: paths, options })
}

/**
 * Recovers and judges: the old view with nothing lost, or the new view whole. Where it is the old one, merging again
 * must give the new one. Returns what is wrong.
 */
export async function recoverAndJudge(attempt: Attempt): Promise<string[]> {
  closeAll(attempt)
  try {
    await engine.recover(attempt.request)
  } catch (cause) {
    return [`recover threw ${describeError(cause)}`]
  }
  const state = judge(attempt)
  if (state.problems.length > 0 || state.isNew) return state.problems
  try {
    await engine.merge(attempt.request)
  } catch (cause) {
    return [`merging again threw ${describeError(cause)}`]
  }
  const again = judge(attempt)
  return again.isNew ? again.problems : [...again.problems, 'merging again left the old view']
}

/** Whether the disk holds the old state or the new one. */
export function judge({ directory, request, view, raw, paths }: Attempt): { isNew: boolean; problems: string[] } {
  const leftovers = readdirSync(directory).filter((name) => name.startsWith('.lsync'))
  const problems = leftovers.map((name) => `left behind: ${name}`)
  const changed = (from: number) =>
    paths
      .slice(from)
      .flatMap((path, index) =>
        diffTrees(raw[index + from] as Tree, readTree(path)).map((line) => `layer ${index + from}: ${line}`),
      )
  if (request.mode !== 'in-place') {
    problems.push(...changed(0))
    const output = request.output as string
    if (!existsSync(output)) return { isNew: false, problems }
    return { isNew: true, problems: [...problems, ...diffTrees(view, shownResult(directory, request, output))] }
  }
  const isOld = existsSync(paths[0] as string) && changed(0).length === 0
  if (isOld) return { isNew: false, problems }
  problems.push(...changed(2), ...diffTrees(view, shownResult(directory, request, paths[1] as string, paths.slice(2))))
  if (existsSync(paths[0] as string)) {
    const rest = [...readTree(paths[0] as string).keys()].filter((path) => path !== '')
    if (rest.length > 0) problems.push(`the upper is not used up: ${rest.join(' ')}`)
  }
  return { isNew: true, problems }
}

function shownResult(directory: string, request: MergeCase, result: string, below: readonly string[] = []): Tree {
  if (request.mode === 'delta') return show(directory, [result, ...below])
  return below.length === 0 ? shownAlone(readTree(result), 'trusted', true) : show(directory, [result, ...below])
}

/** Closes what this process holds open of the attempt, as the end of a process does. */
export function closeAll(attempt: Attempt): void {
  for (const { fd } of descriptorsBelow(attempt.directory)) closeSync(fd)
}

export function tearDown(attempt: Attempt): void {
  closeAll(attempt)
  removeTree(attempt.directory)
}
