import { once } from 'node:events'
import { printable, textOf } from '@lsync/posix'
import {
  diffSnapshots,
  dumpFile,
  findInSnapshots,
  listContent,
  listSnapshots,
  locatePath,
  measureSnapshots,
  type NodeType,
  type ShownNode,
  type Snapshot,
} from '@lsync/snapshot'
import { type Command, Option } from 'commander'
import { examples } from '../../examples.ts'
import { countOf, sizeOf } from '../../progress-line.ts'
import type { Session } from '../../session.ts'
import {
  addFilterOptions,
  addRepositoryOptions,
  type FilterOptions,
  filterOf,
  type RepositoryOptions,
  snapshotOf,
  withRepository,
} from './repository.ts'

type Options = RepositoryOptions & FilterOptions

export function defineList(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples('lsync snapshot list -r /backup/repo', 'lsync snapshot list -r /backup/repo --host web1 --json'),
  )
  addFilterOptions(addRepositoryOptions(command)).action(async (options: Options) => {
    await withRepository(options, session, async (repository) => {
      for (const snapshot of await listSnapshots(repository, filterOf(options), session.signal)) {
        session.output.data(
          () => ({ type: 'snapshot', ...fieldsOf(snapshot) }),
          () => lineOf(snapshot),
        )
      }
    })
  })
}

/** One snapshot as `--json` has it. */
export function fieldsOf(snapshot: Snapshot): Record<string, unknown> {
  const { id, time, tree, paths, hostname, username, tags, parent, original } = snapshot
  return {
    id,
    time,
    tree,
    paths: paths.map((path) => textOf(path)),
    host: hostname,
    user: username,
    tags,
    parent: parent ?? null,
    original: original ?? null,
  }
}

/** One snapshot as people see it. */
export function lineOf({ id, time, hostname, tags, paths }: Snapshot): string {
  const moment = time.slice(0, 19).replace('T', ' ')
  const marks = tags.length === 0 ? '' : `  [${printable(tags.join(','))}]`
  return `${id.slice(0, 8)}  ${moment}  ${printable(hostname)}${marks}  ${paths.map((path) => printable(path)).join(' ')}`
}

export function defineShow(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot show -r /backup/repo latest',
        'lsync snapshot show -r /backup/repo 1a2b3c4d:/srv/up/etc --flat',
      ),
    )
    .argument('<snapshot>', 'its id, or latest; with :PATH only what is there')
  addFilterOptions(addRepositoryOptions(command))
    .option('--flat', 'do not look into directories')
    .action(async (name: string, options: Options & { flat?: true }) => {
      await withRepository(options, session, async (repository) => {
        const { snapshot, path } = await snapshotOf(repository, name, options, session)
        const located = await locatePath(repository, snapshot, path, session.signal)
        const content = listContent(repository, located, { isRecursive: options.flat !== true, signal: session.signal })
        for await (const shown of content) {
          session.output.data(
            () => ({ type: 'entry', ...entryOf(shown) }),
            () => entryLine(shown),
          )
        }
      })
    })
}

function entryOf({ path, node }: ShownNode): Record<string, unknown> {
  const { type, mode, uid, gid, mtime, sizeBytes, links, linkTarget, device, xattrs } = node
  return {
    path: textOf(path),
    kind: type,
    mode: mode & 0o7777,
    uid,
    gid,
    mtime,
    ...(type === 'file' ? { sizeBytes } : {}),
    ...(links > 1 ? { links } : {}),
    ...(type === 'symlink' ? { target: textOf(linkTarget) } : {}),
    ...(type === 'dev' || type === 'chardev' ? { device } : {}),
    ...(xattrs.length === 0
      ? {}
      : { xattrs: Object.fromEntries(xattrs.map(([name, value]) => [textOf(name), value.toString('base64')])) }),
  }
}

const LETTERS: Readonly<Record<NodeType, string>> = {
  file: '-',
  dir: 'd',
  symlink: 'l',
  fifo: 'p',
  socket: 's',
  chardev: 'c',
  dev: 'b',
}

function entryLine({ path, node }: ShownNode): string {
  const mode = (node.mode & 0o7777).toString(8).padStart(4, '0')
  const size = node.type === 'file' ? String(node.sizeBytes) : '-'
  const target = node.type === 'symlink' ? ` -> ${printable(node.linkTarget)}` : ''
  const owner = `${node.uid}:${node.gid}`
  return `${LETTERS[node.type]}${mode} ${owner.padStart(11)} ${size.padStart(12)} ${node.mtime.slice(0, 19)} ${printable(path)}${target}`
}

export function defineDiff(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot diff -r /backup/repo 1a2b3c4d latest',
        'lsync snapshot diff -r /backup/repo 1a2b:/srv/a 3c4d:/srv/b',
      ),
    )
    .argument('<before>', 'a snapshot; with :PATH only what is there')
    .argument('<after>', 'another one')
  addFilterOptions(addRepositoryOptions(command)).action(async (before: string, after: string, options: Options) => {
    await withRepository(options, session, async (repository) => {
      const place = async (name: string) => {
        const { snapshot, path } = await snapshotOf(repository, name, options, session)
        return locatePath(repository, snapshot, path, session.signal)
      }
      const changes = diffSnapshots(repository, await place(before), await place(after), session.signal)
      for await (const { path, change } of changes) {
        session.output.data(
          () => ({ type: 'change', change, path: textOf(path) }),
          () => `${SIGNS[change]} ${printable(path)}`,
        )
      }
    })
  })
}

const SIGNS = { added: 'A', removed: 'D', content: 'M', metadata: 'U', type: 'T' } as const

export function defineFind(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        "lsync snapshot find -r /backup/repo '*.conf'",
        'lsync snapshot find -r /backup/repo --kind file passwd',
      ),
    )
    .argument('<pattern...>', 'as for --exclude of create; one that matches is enough')
  addFilterOptions(addRepositoryOptions(command))
    .addOption(new Option('--kind <kind>', 'only entries of this kind').choices(Object.keys(LETTERS)))
    .action(async (patterns: string[], options: Options & { kind?: NodeType }) => {
      await withRepository(options, session, async (repository) => {
        const snapshots = await listSnapshots(repository, filterOf(options), session.signal)
        await repository.loadIndex(session.signal)
        const types = options.kind === undefined ? {} : { types: [options.kind] }
        let last: string | undefined
        for await (const found of findInSnapshots(repository, {
          snapshots,
          patterns,
          ...types,
          signal: session.signal,
        })) {
          const { snapshot } = found
          if (snapshot.id !== last) session.output.note(lineOf(snapshot))
          last = snapshot.id
          session.output.data(
            () => ({ type: 'found', snapshot: snapshot.id, ...entryOf(found) }),
            () => entryLine(found),
          )
        }
      })
    })
}

export function defineDump(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot dump -r /backup/repo latest:/srv/up/etc/passwd',
        'lsync snapshot dump -r /backup/repo 1a2b:/db.sql | psql',
      ),
    )
    .argument('<file>', 'a snapshot and the path of a file in it: SNAPSHOT:PATH')
  addFilterOptions(addRepositoryOptions(command)).action(async (name: string, options: Options) => {
    await withRepository(options, session, async (repository) => {
      const { snapshot, path } = await snapshotOf(repository, name, options, session)
      const located = await locatePath(repository, snapshot, path, session.signal)
      for await (const piece of dumpFile(repository, located, session.signal)) {
        if (!process.stdout.write(piece)) await once(process.stdout, 'drain', { signal: session.signal })
      }
    })
  })
}

export function defineStats(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples('lsync snapshot stats -r /backup/repo', 'lsync snapshot stats -r /backup/repo --host web1 --json'),
  )
  addFilterOptions(addRepositoryOptions(command)).action(async (options: Options) => {
    await withRepository(options, session, async (repository) => {
      const snapshots = await listSnapshots(repository, filterOf(options), session.signal)
      await repository.loadIndex(session.signal)
      const stats = await measureSnapshots(repository, snapshots, session.signal)
      session.output.data(
        () => ({ type: 'stats', ...stats }),
        () => {
          const { files, directories, restoreBytes, objects, contentBytes, storedBytes } = stats
          return [
            `${countOf(stats.snapshots)} snapshots: ${countOf(files)} files, ${countOf(directories)} directories`,
            `restored: ${sizeOf(restoreBytes)}`,
            `different: ${sizeOf(contentBytes)} in ${countOf(objects)} objects`,
            `stored: ${sizeOf(storedBytes)}`,
          ].join('\n')
        },
      )
    })
  })
}
