import { hostPath } from '@lsync/posix'
import { createSnapshot, LocalBackend, pruneRepository, Repository } from '@lsync/snapshot'

// Saves a directory, or prunes, again and again until it is killed. Says a line for each snapshot that is reported as saved.
const [, , path = '', password = '', what = '', tree = ''] = process.argv
const backend = new LocalBackend(hostPath(path))
for (;;) {
  const repository = await Repository.open(backend, { password })
  if (what === 'prune') await pruneRepository(repository, { maxUnused: 0 })
  else {
    const { snapshotId } = await createSnapshot(repository, { targets: [{ path: hostPath(tree) }], force: true })
    process.stdout.write(`${snapshotId}\n`)
  }
  repository.close()
}
