import { hostPath } from '@lsync/posix'
import {
  copySnapshots,
  createSnapshot,
  forgetSnapshots,
  LocalBackend,
  listSnapshots,
  pruneRepository,
  Repository,
  repairIndex,
  repairPacks,
  repairSnapshots,
} from '@lsync/snapshot'

// Does one thing to a repository until it is killed: again and again, where it can be done again. Says a line for each
// snapshot that is reported as saved, and one when it begins.
const [, , path = '', password = '', what = '', other = ''] = process.argv
const open = (at: string) => Repository.open(new LocalBackend(hostPath(at)), { password })

async function save(): Promise<void> {
  const repository = await open(path)
  const { snapshotId } = await createSnapshot(repository, { targets: [{ path: hostPath(other) }], force: true })
  process.stdout.write(`${snapshotId}\n`)
  repository.close()
}

const operations: Readonly<Record<string, (repository: Repository) => Promise<unknown>>> = {
  prune: (repository) => pruneRepository(repository, { maxUnused: 0 }),
  forget: (repository) => forgetSnapshots(repository, { keep: { last: 1 } }),
  'repair index': (repository) => repairIndex(repository),
  'repair packs': (repository) => repairPacks(repository, [other]),
  'repair snapshots': async (repository) =>
    repairSnapshots(repository, { snapshots: await listSnapshots(repository), forget: true }),
  copy: async (repository) => {
    const source = await open(other)
    await copySnapshots(source, repository, { snapshots: await listSnapshots(source) })
  },
}

if (what === 'create') for (;;) await save()
const repository = await open(path)
process.stdout.write('begins\n')
await operations[what]?.(repository)
repository.close()
