import type { Command } from 'commander'
import { examples } from '../examples.ts'
import type { Session } from '../session.ts'
import { defineCreate } from './snapshot/create.ts'
import { defineDiff, defineDump, defineFind, defineList, defineShow, defineStats } from './snapshot/inspect.ts'
import {
  defineCheck,
  defineCopy,
  defineForget,
  defineInit,
  defineKey,
  definePrune,
  defineRepair,
  defineTag,
  defineUnlock,
} from './snapshot/maintain.ts'
import { defineRestore } from './snapshot/restore.ts'

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync snapshot create -r /backup/repo /srv/up',
      'lsync snapshot restore -r /backup/repo latest /srv/back',
    ),
  )
  const add = (name: string, summary: string, definer: (command: Command, session: Session) => void) =>
    definer(command.command(name).description(summary), session)
  add('init', 'make a repository', defineInit)
  add('create', 'save directories', defineCreate)
  add('list', 'list the snapshots of a repository', defineList)
  add('show', 'show what is in a snapshot', defineShow)
  add('diff', 'show what changed between two snapshots', defineDiff)
  add('find', 'look for names in all snapshots', defineFind)
  add('restore', 'make a directory what a snapshot shows', defineRestore)
  add('dump', 'write the content of a file to standard output', defineDump)
  add('tag', 'change the tags of snapshots', defineTag)
  add('forget', 'remove snapshots by rules', defineForget)
  add('prune', 'remove what no snapshot needs', definePrune)
  add('check', 'look whether a repository is whole', defineCheck)
  add('repair', 'mend an index, packs or snapshots', defineRepair)
  add('copy', 'copy snapshots to another repository', defineCopy)
  add('stats', 'say how much snapshots hold and take', defineStats)
  add('key', 'add and remove passwords', defineKey)
  add('unlock', 'remove locks that nobody holds any more', defineUnlock)
}
