import type { Command } from 'commander'
import type { Session } from './session.ts'

/** One command: what `lsync --help` says of it, and where the rest is. */
export interface CommandEntry {
  readonly summary: string
  /** Loaded only when it is needed, since the engine behind it takes longer to load than to ask for its version. */
  readonly load: () => Promise<{ readonly define: (command: Command, session: Session) => void }>
}

/** Every command by name, in the order of the help. */
export const commands: Readonly<Record<string, CommandEntry>> = {
  merge: { summary: 'fold an upper layer into what lies below it', load: () => import('./commands/merge.ts') },
  recover: { summary: 'finish or roll back what was interrupted', load: () => import('./commands/recover.ts') },
}
