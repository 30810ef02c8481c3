import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  appendFileSync,
  chmodSync,
  cpSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statfsSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { release, tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const workspace = fileURLToPath(new URL('..', import.meta.url)).replace(/\/$/, '')
const lsync = `${workspace}/packages/cli/bin/lsync`

/** Larger files would only make the copy of node_modules take longer: compilers and other programs. */
const LARGEST_BYTES = 2_000_000
/** The lower, a new version, and the copy that cp makes. */
const ROOM_BYTES = 600_000_000

/** Directories of the demo's own, on different file systems, and whose marks its mounts use. */
interface Sites {
  readonly directories: readonly string[]
  readonly namespace: 'trusted' | 'user'
}

/** Runs the demo where it may mount: as root in a mount namespace of its own, else in a user namespace. */
export async function enterDemo(): Promise<number> {
  const isRoot = process.geteuid?.() === 0
  const directories = makeDirectories()
  if (directories.length === 0) {
    console.error(
      `The demo needs ${ROOM_BYTES / 1e6} MB in one of ${places().join(', ')}; set TMPDIR to another place.`,
    )
    return 1
  }
  const sites: Sites = { directories, namespace: isRoot ? 'trusted' : 'user' }
  try {
    const script = fileURLToPath(import.meta.url)
    const child = spawn('unshare', [isRoot ? '-m' : '-Urm', process.execPath, script, JSON.stringify(sites)], {
      stdio: 'inherit',
    })
    // The terminal has told the child too; what is left to do here is to clean up after it.
    process.on('SIGINT', () => undefined)
    process.on('SIGTERM', () => child.kill())
    return await new Promise<number>((resolve, reject) => {
      child.on('error', reject)
      child.on('exit', (code) => resolve(code ?? 130))
    })
  } finally {
    // The mounts are gone with their namespace.
    for (const directory of directories) remove(directory)
  }
}

function places(): string[] {
  // Memory first: a disk may take a minute for what is being shown.
  return [...new Set(['/dev/shm', tmpdir(), '/var/tmp', `${workspace}/node_modules`])]
}

function makeDirectories(): string[] {
  return places().flatMap((place) => {
    try {
      const { bavail, bsize } = statfsSync(place)
      return bavail * bsize < ROOM_BYTES ? [] : [mkdtempSync(join(place, 'lsync-demo-'))]
    } catch {
      return []
    }
  })
}

function remove(directory: string): void {
  // Overlayfs makes its workdir unreadable.
  spawnSync('chmod', ['-R', 'u+rwX', directory], { stdio: 'ignore' })
  rmSync(directory, { recursive: true, force: true })
}

function showDemo({ directories, namespace }: Sites): number {
  const options = namespace === 'user' ? ',userxattr' : ',redirect_dir=on,metacopy=on'
  const place = directories.find((directory) => canMount(directory, options))
  if (place === undefined) {
    console.error(
      `No overlay can be mounted on ${directories.join(' or ')}: run as root, or set TMPDIR to a local disk.`,
    )
    return 1
  }
  const [lower, upper, work, merged, next] = ['lower', 'upper', 'work', 'merged', 'new'].map((name) =>
    join(place, name),
  ) as [string, string, string, string, string]
  process.chdir(place)
  say(`lsync on Linux ${release()}, in ${place}, with marks in ${namespace}.overlay.*\n`)

  cpSync(`${workspace}/node_modules`, lower, {
    recursive: true,
    verbatimSymlinks: true,
    preserveTimestamps: true,
    filter: (path) => lstatSync(path).size < LARGEST_BYTES && !path.endsWith('/.cache'),
  })
  say(`The lower is a copy of this workspace's node_modules: ${count(listing(lower).size)} entries.`)

  for (const directory of [upper, work, merged]) mkdirSync(directory)
  run('mount', [
    '-t',
    'overlay',
    'overlay',
    '-o',
    `lowerdir=${lower},upperdir=${upper},workdir=${work}${options}`,
    merged,
  ])
  const changes = change(merged)
  const shown = listing(merged)
  say(`Through a kernel overlay mount on it: ${changes.join(', ')}.`)
  say(`The mount now shows ${count(shown.size)} entries; each is written down, with its content's hash.\n`)
  const cpMs = timed(() => run('cp', ['-a', `${merged}/.`, join(place, 'copy')]))
  run('umount', [merged])
  remove(join(place, 'copy'))

  const mark = namespace === 'user' ? ['--namespace', 'user'] : []
  const layers = ['--upper', 'upper', '--lower', 'lower', ...mark]
  const toNew = command('merge', ...layers, '--output', 'new')
  command('verify', '--stack', 'upper:lower', ...mark, '--against', 'new')
  const inPlace = command('merge', ...layers, '--in-place', '--yes')

  const differences = [...compare(shown, listing(next)), ...compare(shown, listing(lower))]
  for (const difference of differences.slice(0, 10)) say(`  DIFFERS: ${difference}`)
  if (differences.length > 0) return 1
  say(
    `Proof: both results equal what the kernel's mount showed, in all ${count(shown.size)} entries: type, mode, owner,`,
  )
  say('       size, content, mtime to the nanosecond, symlink targets, hard links.\n')

  const figure = (what: string, ms: number) => say(`  ${what.padEnd(40)}${(ms / 1000).toFixed(2).padStart(6)} s`)
  say('Figures, starting the program included (`npm run bench merge` measures properly):')
  figure('for scale: cp -a of the mounted view', cpMs)
  figure('lsync merge --output (new version)', toNew)
  figure('lsync merge --in-place', inPlace)
  say(`
From here on ./node_modules/.bin/lsync is the command. To try next:
  ./node_modules/.bin/lsync merge --help
  ./node_modules/.bin/lsync merge --upper U --lower L --output NEW --dry-run
  ./node_modules/.bin/lsync probe /srv`)
  return 0
}

function canMount(directory: string, options: string): boolean {
  const [lower, upper, work, merged] = ['1', '2', '3', '4'].map((name) => join(directory, 'try', name)) as [
    string,
    string,
    string,
    string,
  ]
  for (const path of [lower, upper, work, merged]) mkdirSync(path, { recursive: true })
  const mountOptions = `lowerdir=${lower},upperdir=${upper},workdir=${work}${options}`
  const { status } = spawnSync('mount', ['-t', 'overlay', 'overlay', '-o', mountOptions, merged], { stdio: 'ignore' })
  if (status === 0) {
    writeFileSync(join(merged, 'file'), '')
    run('umount', [merged])
  }
  remove(join(directory, 'try'))
  return status === 0
}

/** What someone might do in a day: through the mount, with ordinary system calls. */
function change(root: string): string[] {
  const packages = readdirSync(join(root, '.pnpm'))
    .filter((name) => name.includes('@'))
    .map((name) => join(root, '.pnpm', name))
    .sort()
  const files = packages.flatMap((directory) =>
    pathsBeneath(directory)
      .map((path) => join(directory, path))
      .filter((path) => lstatSync(path).isFile()),
  )
  const every = (step: number, offset: number) => files.filter((_, index) => index % step === offset)
  const edited = every(6, 0)
  for (const file of edited) appendFileSync(file, '\n// edited in the container\n')
  const chmodded = every(6, 1)
  for (const file of chmodded) chmodSync(file, 0o640)
  const removed = every(12, 2)
  for (const file of removed) rmSync(file)

  const added = join(root, 'added')
  for (let index = 0; index < 2000; index++) {
    const directory = join(added, String(index % 40))
    mkdirSync(directory, { recursive: true })
    writeFileSync(join(directory, `file-${index}`), `content ${index}\n`.repeat(index % 50))
  }
  linkSync(join(added, '0/file-0'), join(added, 'linked'))
  symlinkSync('linked', join(added, 'symlink'))

  const [gone, replaced, renamed] = packages as [string, string, string]
  rmSync(gone, { recursive: true })
  rmSync(replaced, { recursive: true })
  mkdirSync(replaced)
  writeFileSync(join(replaced, 'only'), 'a directory that hides what lay below it\n')
  const said = [
    `${count(edited.length)} files edited`,
    `${count(chmodded.length)} given another mode`,
    `${count(removed.length)} removed`,
    '2,000 written',
    'a package removed, one replaced',
  ]
  try {
    renameSync(renamed, `${renamed}-renamed`)
    said.push('one renamed')
  } catch (error) {
    // Without redirect_dir, which userxattr excludes, the kernel leaves that to mv.
    if ((error as NodeJS.ErrnoException).code !== 'EXDEV') throw error
  }
  return said
}

/** Every path in a tree, sorted by directory. Symlinks are not followed, as readdir's own `recursive` would. */
function pathsBeneath(root: string, path = ''): string[] {
  const entries = readdirSync(join(root, path), { withFileTypes: true })
  return entries
    .sort((left, right) => (left.name < right.name ? -1 : 1))
    .flatMap((entry) => {
      const child = join(path, entry.name)
      return entry.isDirectory() ? [child, ...pathsBeneath(root, child)] : [child]
    })
}

/** A tree as the file system shows it: one line for each path. */
function listing(root: string): Map<string, string> {
  const lines = new Map<string, string>()
  const namesOfInode = new Map<string, string[]>()
  for (const path of ['', ...pathsBeneath(root)]) {
    const full = join(root, path)
    const stat = lstatSync(full, { bigint: true })
    const fields = [stat.mode.toString(8), stat.uid, stat.gid, stat.mtimeNs]
    if (stat.isSymbolicLink()) fields.push(readlinkSync(full))
    if (stat.isFile()) {
      fields.push(stat.size, createHash('sha256').update(readFileSync(full)).digest('hex'))
      const inode = `${stat.dev}:${stat.ino}`
      namesOfInode.set(inode, [...(namesOfInode.get(inode) ?? []), path])
    }
    lines.set(path, fields.join(' '))
  }
  // The link count says nothing here: a new version shares its unchanged files with the lower.
  for (const names of namesOfInode.values()) {
    if (names.length > 1) for (const name of names) lines.set(name, `${lines.get(name)} as ${names.join(', ')}`)
  }
  return lines
}

function compare(expected: Map<string, string>, actual: Map<string, string>): string[] {
  const paths = new Set([...expected.keys(), ...actual.keys()])
  return [...paths]
    .filter((path) => expected.get(path) !== actual.get(path))
    .map((path) => `${path || 'the root'}: ${expected.get(path) ?? 'absent'} became ${actual.get(path) ?? 'absent'}`)
}

/** Runs lsync before the reader's eyes, and gives the time that it took. */
function command(...args: string[]): number {
  say(`$ lsync ${args.join(' ')}`)
  const start = performance.now()
  const { status } = spawnSync(lsync, args, { stdio: 'inherit' })
  const elapsedMs = performance.now() - start
  if (status !== 0) throw new Error(`lsync ended with ${status}`)
  say('')
  return elapsedMs
}

function run(program: string, args: readonly string[]): void {
  const { status, stderr, error } = spawnSync(program, args, { encoding: 'utf8' })
  if (error !== undefined || status !== 0) throw new Error(`${program} ${args.join(' ')}: ${error?.message ?? stderr}`)
}

function timed(work: () => void): number {
  const start = performance.now()
  work()
  return performance.now() - start
}

function count(value: number): string {
  return value.toLocaleString('en-US')
}

function say(text: string): void {
  process.stdout.write(`${text}\n`)
}

if (import.meta.main) process.exitCode = showDemo(JSON.parse(process.argv[2] as string) as Sites)
