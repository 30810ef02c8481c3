// One end of a switch in a process of its own, which kills itself where a test says so: after a verb, before its answer, or at
// a step within.
import { ContainerRoot, FileLeases, NodeState, SwitchSide, serveSwitch } from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'

const [home = '', state = '', durationMs = '', killAt = ''] = process.argv.slice(2)
const root = await ContainerRoot.open(home as HostPath, 'lab', {
  state: NodeState.open(state as HostPath),
  leases: ({ leaseDirectory }) => new FileLeases(leaseDirectory, { durationMs: Number(durationMs) }),
})
const die = () => {
  process.kill(process.pid, 'SIGKILL')
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10_000)
}
root.events.on('step', ({ verb, step }) => {
  if (killAt === `${verb}:${step}`) die()
})
const side = new SwitchSide(root)
for (const verb of ['check', 'preCopy', 'stop', 'pass', 'mount', 'hook', 'commit', 'undo'] as const) {
  const original = side[verb].bind(side) as (...what: unknown[]) => Promise<unknown>
  Object.assign(side, {
    [verb]: async (...what: unknown[]) => {
      const result = await original(...what)
      if (killAt === (verb === 'hook' ? `hook ${String(what[0])}` : verb)) die()
      return result
    },
  })
}
await serveSwitch(side, { input: process.stdin, output: process.stdout })
await root.close()
