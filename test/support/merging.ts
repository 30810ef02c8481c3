import { existsSync, mkdirSync } from 'node:fs'
import { printable } from '@lsync/posix'
import { engine, type MergeCase } from './engine.ts'
import { type OverlayOptions, type Stack, withOverlay } from './overlay.ts'
import { type DiffOptions, diffTrees, type Node, readTree, strayLinks, type Tree } from './tree.ts'

/** A stack to be merged in every way. `layers[0]` is the upper of the merge; `work` says that it is one of the mount too. */
export interface Subject {
  /** Where the results are made. */
  readonly directory: string
  readonly layers: readonly string[]
  readonly work?: string
  readonly options: OverlayOptions
  readonly diff?: DiffOptions
  readonly clones?: readonly NonNullable<MergeCase['clone']>[]
  readonly workers?: number
  /** The bottom is a layer with marks of its own: in place it is compared through a mount, and may stay one. */
  readonly rawBottom?: boolean
}

/** The mount of these layers: the first as the upper where there is a workdir, else all as lowers. */
export function stackOf(layers: readonly string[], work?: string): Stack {
  return work === undefined ? { lowers: layers } : { lowers: layers.slice(1), upper: layers[0] as string, work }
}

/** What the kernel shows. `readOnly` keeps it from writing marks of its own into the upper. */
export function viewOf({ layers, work, options }: Subject, readOnly = true): Tree {
  return withOverlay(stackOf(layers, work), options, readTree, { readOnly })
}

/**
 * A plain tree as a mount would show it: escaped attributes of a nested overlay lose one level. A mark that is still
 * there gets a name that no view has, so that a leak is a difference. `deadMarks` lets those pass that mean nothing
 * where they stand: a shared inode cannot lose them.
 */
export function shownAlone(tree: Tree, namespace: 'trusted' | 'user', deadMarks = false): Tree {
  const prefix = `${namespace}.overlay.`
  const escaped = `${prefix}overlay.`
  const isDead = (mark: string, name: string) =>
    name.startsWith(prefix) && !name.startsWith(escaped) && mark !== 'metacopy'
  const rename = (name: string) =>
    name.startsWith(escaped)
      ? `${prefix}${name.slice(escaped.length)}`
      : name.startsWith(prefix)
        ? `LEAKED ${name}`
        : name
  return new Map(
    [...tree].map(([path, node]): [string, Node] => [
      path,
      {
        ...node,
        xattrs: new Map(
          [...node.xattrs]
            .filter(([name]) => !(deadMarks && node.type !== 'directory' && isDead(name.slice(prefix.length), name)))
            .map(([name, value]) => [rename(name), value]),
        ),
      },
    ]),
  )
}

/** Merges the subject in every mode and compares each result with the kernel's view. Returns what differs, by mode. */
export async function mergeEveryWay(
  subject: Subject,
  modes: readonly MergeCase['mode'][] = allModes,
): Promise<string[]> {
  const problems: string[] = []
  const view = viewOf(subject, false)
  const attempt = async (step: string, work: () => Promise<string[]>) => {
    try {
      problems.push(...(await work()).map((line) => `${step}: ${line}`))
    } catch (cause) {
      problems.push(`${step}: threw ${describeError(cause)}`)
    }
  }
  if (modes.includes('output')) {
    for (const clone of subject.clones ?? (['auto'] as const))
      await attempt(`output ${clone}`, () => output(subject, view, clone))
  }
  if (modes.includes('delta')) {
    for (let depth = 1; depth < subject.layers.length; depth++) {
      // An index belongs to the whole stack: aliases in a lower that is not part of the merge cannot follow.
      if (subject.options.index && depth < subject.layers.length - 1) continue
      await attempt(`delta of ${depth + 1} layers`, () => delta(subject, view, depth))
    }
  }
  if (modes.includes('in-place')) await attempt('in place', () => inPlace(subject, view))
  return problems
}

const allModes = ['output', 'delta', 'in-place'] as const

function requestOf(subject: Subject, rest: Pick<MergeCase, 'mode' | 'lowers'> & Partial<MergeCase>): MergeCase {
  const { layers, work, options, workers } = subject
  return {
    upper: layers[0] as string,
    namespace: options.namespace,
    ...(options.index && work !== undefined ? { workdir: work } : {}),
    workers: workers ?? 0,
    allowEmpty: true, // a random history may delete everything
    ...rest,
  }
}

async function output(subject: Subject, view: Tree, clone: NonNullable<MergeCase['clone']>): Promise<string[]> {
  const { layers, directory, options, diff } = subject
  const before = layers.map(readTree)
  const plain = `${directory}/plain-${clone}`
  const layered = `${directory}/layered-${clone}`
  const request = requestOf(subject, { mode: 'output', lowers: layers.slice(1), clone })
  await engine.merge({ ...request, output: plain, plain: true })
  await engine.merge({ ...request, output: layered })
  const plainTree = readTree(plain)
  const layeredTree = readTree(layered)
  return [
    ...diffTrees(view, plainTree, diff).map((line) => `plain: ${line}`),
    ...diffTrees(view, shownAlone(layeredTree, options.namespace, clone === 'hardlink' || clone === 'auto'), diff).map(
      (line) => `layered: ${line}`,
    ),
    // `auto` may choose hard links to the source.
    ...(clone === 'copy' || clone === 'reflink' ? strayLinks(plainTree) : []).map((line) => `plain: ${line}`),
    ...untouched(before, layers),
  ]
}

async function delta(subject: Subject, view: Tree, depth: number): Promise<string[]> {
  const { layers, directory, diff } = subject
  const before = layers.map(readTree)
  const result = `${directory}/delta${depth}`
  await engine.merge(
    requestOf(subject, {
      mode: 'delta',
      lowers: layers.slice(1, depth + 1),
      output: result,
      clone: subject.clones?.[0] ?? 'auto',
    }),
  )
  const rest = layers.slice(depth + 1)
  return [
    ...diffTrees(view, viewOf({ ...subject, layers: [result, ...rest], ...noWork }), diff),
    ...untouched(before, layers),
  ]
}

const noWork = { work: undefined } as unknown as Record<never, never>

async function inPlace(subject: Subject, view: Tree): Promise<string[]> {
  const { layers, options, diff, directory } = subject
  // A version cloned with hard links shares inodes with the lower that is now changed.
  const clones = existsSync(`${directory}/plain-hardlink`) ? [`${directory}/plain-hardlink`] : []
  const before = clones.map(readTree)
  try {
    await engine.merge(requestOf(subject, { mode: 'in-place', lowers: layers.slice(1) }))
  } catch (cause) {
    // Names of a lower that the merge does not change cannot follow the index; refused before anything is touched.
    if ((cause as { code?: string }).code !== 'INDEX_BELOW' || !options.index || layers.length < 3) throw cause
    return [...diffTrees(view, viewOf(subject), diff), ...untouched(before, clones)]
  }
  const shared = untouched(before, clones).map((line) => `the clone that shares inodes: ${line}`)
  const lowers = layers.slice(1)
  if (lowers.length > 1 || subject.rawBottom === true) {
    return [...diffTrees(view, viewOf({ ...subject, layers: lowers, ...noWork }), diff), ...shared]
  }
  return [...diffTrees(view, shownAlone(readTree(lowers[0] as string), options.namespace), diff), ...shared]
}

function untouched(before: readonly Tree[], layers: readonly string[]): string[] {
  return before.flatMap((tree, index) =>
    diffTrees(tree, readTree(layers[index] as string)).map((line) => `the source layer ${index} changed: ${line}`),
  )
}

export function describeError(cause: unknown): string {
  if (!(cause instanceof Error)) return String(cause)
  const code = (cause as { code?: unknown }).code
  return `${typeof code === 'string' ? `${code} ` : ''}${cause.stack?.split('\n').slice(0, 4).join(' | ')}`
}

/** The raw layers of a failure, one line a name, for a reader to copy into a literal test. */
export function describeLayers(layers: readonly string[]): string {
  return layers
    .map((path, index) => `layer ${index} ${path.slice(path.lastIndexOf('/') + 1)}\n${describeTree(readTree(path))}`)
    .join('\n')
}

export function describeTree(tree: Tree): string {
  const lines: string[] = []
  for (const [path, node] of tree) {
    const what =
      node.type === 'character' && node.rdev === 0
        ? 'WHITEOUT'
        : `${node.type} ${node.mode.toString(8)} ${node.uid}:${node.gid}${node.flags === '' ? '' : ` +${node.flags}`}`
    const data = node.content === undefined ? '' : ` '${printable(node.content)}' ${node.sizeBytes}`
    const links = node.links === undefined ? '' : ` links=${node.links.map(printable).join(',')}`
    const xattrs = [...node.xattrs].map(([name, value]) => ` ${name}=${readable(value)}`).join('')
    lines.push(
      `  ${path === '' ? '.' : printable(path)}  ${what}${data}${node.target === undefined ? '' : ` -> ${printable(node.target)}`}${links}${xattrs}`,
    )
  }
  return lines.join('\n')
}

function readable(hex: string): string {
  const text = Buffer.from(hex, 'hex').toString('latin1')
  return text.length < 40 && /^[\x20-\x7e]*$/.test(text) ? `'${text}'` : `0x${hex.slice(0, 24)}…${hex.length / 2}`
}

/** An empty directory, made. */
export function emptyDirectory(path: string): string {
  mkdirSync(path)
  return path
}
