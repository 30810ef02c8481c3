import { existsSync } from 'node:fs'
import { findProgram, versionOf } from './command.ts'
import type { MissingPeer } from './peers.ts'
import type { Sshd } from './sshd.ts'

/** One program that carries a tree to a place, once. */
export type Carrier = {
  name: string
  /** `target` exists and is empty. */
  command: (source: string, target: string) => readonly string[]
}

export type Carriers = { carriers: Carrier[]; missing: MissingPeer[] }

/** Quotes for /bin/sh. */
const quote = (word: string): string => `'${word.replaceAll("'", `'\\''`)}'`

const shell = (line: string): string[] => ['/bin/sh', '-c', line]

/** tar with everything that it can keep. */
const tarOptions = '--xattrs --xattrs-include="*" --acls --numeric-owner --sparse'

function installed(carriers: readonly (Carrier & { program: string })[]): Carriers {
  const result: Carriers = { carriers: [], missing: [] }
  for (const { program, ...carrier } of carriers) {
    if (findProgram(program) === undefined)
      result.missing.push({ name: carrier.name, reason: `${program} is not installed` })
    else result.carriers.push(carrier)
  }
  return result
}

/** `state` is an empty folder for what lsync and unison remember; each run gets its own. */
export type CarrierRequest = { lsync: string; state: () => string }

function lsyncCarriers(request: CarrierRequest, carriers: readonly Carrier[]): Carriers {
  if (existsSync(request.lsync)) return { carriers: [...carriers], missing: [] }
  return { carriers: [], missing: [{ name: 'lsync', reason: `${request.lsync} does not exist` }] }
}

function join(...lists: readonly Carriers[]): Carriers {
  return {
    carriers: lists.flatMap(({ carriers }) => carriers),
    missing: lists.flatMap(({ missing }) => missing),
  }
}

/** Those that carry a tree from one directory of this machine to another. */
export function localCarriers(request: CarrierRequest): Carriers {
  const lsync: Carrier = {
    name: 'lsync',
    command: (source, target) => [request.lsync, 'sync', source, target, '--once', ...stateOption(request)],
  }
  const others = installed([
    { name: 'cp -a', program: 'cp', command: (source, target) => ['cp', '-aT', source, target] },
    {
      name: 'rsync -aHAX',
      program: 'rsync',
      command: (source, target) => ['rsync', '-aHAX', `${source}/`, `${target}/`],
    },
    {
      name: 'tar | tar',
      program: 'tar',
      command: (source, target) =>
        shell(
          `tar -C ${quote(source)} ${tarOptions} -cf - . | tar -C ${quote(target)} ${tarOptions} --same-owner -xpf -`,
        ),
    },
    {
      name: 'unison -batch',
      program: 'unison',
      command: (source, target) => [
        ...['env', `UNISON=${request.state()}`, 'unison', source, target],
        ...['-batch', '-silent', '-ui', 'text', '-owner', '-group', '-numericids', '-perms', '-1', '-times'],
      ],
    },
  ])
  return join(lsyncCarriers(request, [lsync]), others)
}

/** Those that carry a tree over ssh. */
export function sshCarriers(request: CarrierRequest & { sshd: Sshd }): Carriers {
  const { sshd } = request
  const client = sshd.client.map(quote).join(' ')
  const url = (target: string): string => `ssh://${sshd.user}@127.0.0.1:${sshd.port}${target}`
  const lsync = (name: string, ...options: string[]): Carrier => ({
    name,
    command: (source, target) => [
      ...['env', `HOME=${sshd.home}`, request.lsync],
      ...['sync', source, url(target), '--once', '--remote-lsync', request.lsync],
      ...options,
      ...stateOption(request),
    ],
  })
  const others = installed([
    {
      name: 'rsync -aHAX -e ssh',
      program: 'rsync',
      command: (source, target) => ['rsync', '-aHAX', '-e', client, `${source}/`, `${sshd.host}:${target}/`],
    },
    {
      name: 'tar | ssh tar',
      program: 'tar',
      command: (source, target) => {
        const unpack = `tar -C ${quote(target)} ${tarOptions} --same-owner -xpf -`
        return shell(`tar -C ${quote(source)} ${tarOptions} -cf - . | ${client} ${sshd.host} ${quote(unpack)}`)
      },
    },
  ])
  return join(lsyncCarriers(request, [lsync('lsync'), lsync('lsync --rsh ssh', '--rsh', client)]), others)
}

const stateOption = (request: CarrierRequest): string[] => ['--state', request.state()]

/** Versions of the programs that run here, for the record. */
export function carrierVersions(lsync: string): Record<string, string> {
  const versions: Record<string, string> = {}
  const add = (name: string, version: string | undefined): void => {
    if (version !== undefined) versions[name] = version
  }
  if (existsSync(lsync)) add('lsync', versionOf(lsync))
  for (const program of ['rsync', 'cp', 'tar']) if (findProgram(program) !== undefined) add(program, versionOf(program))
  if (findProgram('unison') !== undefined) add('unison', versionOf('unison', ['-version']))
  if (findProgram('lsyncd') !== undefined) add('lsyncd', versionOf('lsyncd', ['-version']))
  if (findProgram('ssh') !== undefined) add('ssh', versionOf('ssh', ['-V']))
  return versions
}
