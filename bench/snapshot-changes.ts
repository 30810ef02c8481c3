import { readFileSync, writeFileSync } from 'node:fs'
import { bytesOf, hostPath } from '@lsync/posix'
import { createSnapshot, findSnapshot, LocalBackend, Repository } from '@lsync/snapshot'

// One snapshot of listed changes, as a daemon with a journal takes it: REPOSITORY TREE CHANGES RESULT. CHANGES has a path a
// line; RESULT gets the ms from when the repository is open, as a daemon has it, until the snapshot is durable.
const [location = '', tree = '', list = '', result = ''] = process.argv.slice(2)
const repository = await Repository.open(new LocalBackend(hostPath(location)), {
  password: process.env['LSYNC_PASSWORD'] ?? '',
})
const parent = (await findSnapshot(repository, 'latest')).id
const paths = readFileSync(list, 'utf8').trim().split('\n')
const changes = paths.map((path) => ({ path: bytesOf(path), scope: 'entry' as const }))
const startMs = performance.now()
const { counts } = await createSnapshot(repository, { targets: [{ path: hostPath(tree), changes }], parent })
writeFileSync(result, String(performance.now() - startMs))
repository.close()
if (counts.filesChanged !== paths.length) throw new Error(`${counts.filesChanged} of ${paths.length} changes were seen`)
