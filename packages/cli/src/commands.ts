import type { Command } from 'commander'
import type { Session } from './session.ts'

/** One command: what `lsync --help` says of it, and where the rest is. */
export interface CommandEntry {
  readonly summary: string
  /** What to do when it was interrupted, where something may have begun. */
  readonly afterInterrupt?: string
  /** Loaded only when it is needed, since the engine behind it takes longer to load than to ask for its version. */
  readonly load: () => Promise<{ readonly define: (command: Command, session: Session) => void }>
}

const RECOVER = '`lsync recover DIR` finishes or rolls back what had begun on DIR'
const AGAIN = 'run it again'
const FINISHES = 'run it again: what had begun on the root is finished or taken back first'

/** Every command by name, in the order of the help. */
export const commands: Readonly<Record<string, CommandEntry>> = {
  merge: {
    summary: 'fold an upper layer into what lies below it',
    afterInterrupt: RECOVER,
    load: () => import('./commands/merge.ts'),
  },
  diff: { summary: 'show what an upper layer changed', load: () => import('./commands/diff.ts') },
  verify: { summary: 'compare a tree with what a stack of layers shows', load: () => import('./commands/verify.ts') },
  recover: {
    summary: 'finish or roll back what was interrupted',
    afterInterrupt: RECOVER,
    load: () => import('./commands/recover.ts'),
  },
  plan: { summary: 'write the plan of a merge, to be applied elsewhere', load: () => import('./commands/plan.ts') },
  apply: {
    summary: 'carry out such a plan where the data lies',
    afterInterrupt: RECOVER,
    load: () => import('./commands/apply.ts'),
  },
  check: { summary: 'look for what is wrong in the layers of a stack', load: () => import('./commands/check.ts') },
  vacuum: {
    summary: 'drop from an upper layer what changed nothing',
    afterInterrupt: RECOVER,
    load: () => import('./commands/vacuum.ts'),
  },
  deref: {
    summary: 'unfold the redirects and metacopies of an upper layer',
    afterInterrupt: RECOVER,
    load: () => import('./commands/deref.ts'),
  },
  layer: {
    summary: 'turn layers into other forms: tar, OCI, .wh. files',
    afterInterrupt: AGAIN,
    load: () => import('./commands/layer.ts'),
  },
  sync: {
    summary: 'follow an upper and carry it to other places',
    afterInterrupt: 'start it again: it goes on from the last checkpoint',
    load: () => import('./commands/sync.ts'),
  },
  switch: {
    summary: 'move a container to another node, and back if it fails',
    afterInterrupt: '`lsync switch NAME --resume` settles what had begun',
    load: () => import('./commands/switch.ts'),
  },
  hooks: { summary: "say how a root's container is stopped and started", load: () => import('./commands/hooks.ts') },
  snapshot: {
    summary: "keep versions of directories in a repository of restic's format",
    afterInterrupt: 'run it again: what is there already is not stored or restored once more',
    load: () => import('./commands/snapshot.ts'),
  },
  serve: {
    summary: 'be the other end of a sync, over standard input and output',
    load: () => import('./commands/serve.ts'),
  },
  root: {
    summary: 'keep the root of a container on a store: versions, mounts, rollback',
    afterInterrupt: FINISHES,
    load: () => import('./commands/root.ts'),
  },
  solidify: {
    summary: 'make a version of what a root holds now',
    afterInterrupt: FINISHES,
    load: () => import('./commands/solidify.ts'),
  },
  image: {
    summary: 'turn container images into layers, and layers into images',
    afterInterrupt: AGAIN,
    load: () => import('./commands/image.ts'),
  },
  probe: { summary: 'find out what a file system can do', load: () => import('./commands/probe.ts') },
  completion: { summary: 'print the completion script of a shell', load: () => import('./commands/completion.ts') },
}
