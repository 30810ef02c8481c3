import { type Finding, hostPath, type ProbeReport, printable, probe, textOf, type Verdict } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { pathArgument } from '../options.ts'
import { sizeOf } from '../progress-line.ts'
import type { Session } from '../session.ts'

export function define(command: Command, session: Session): void {
  command
    .addHelpText('before', examples('lsync probe /srv', 'lsync probe /srv --json | jq .canBeOverlayUpper'))
    .argument('<dir>', 'a directory of the file system; experiments are made beneath it and removed')
    .action((dir: string) => {
      const report = probe(pathArgument(dir))
      session.output.data(
        () => ({ ...jsonOf(report), type: 'probe' }),
        () => textual(report, hostPath(dir), session),
      )
    })
}

function jsonOf({ path, fileSystem, ...others }: ProbeReport) {
  const { source, ...rest } = fileSystem
  return {
    path: textOf(path),
    fileSystem: { ...rest, source: source === undefined ? null : textOf(source) },
    ...others,
  }
}

function textual(report: ProbeReport, dir: string, session: Session): string {
  const { fileSystem, limits } = report
  const bold = (text: string) => session.output.styled('bold', text)
  const rows: [string, string][] = [
    [
      'file system',
      `${fileSystem.type}${report.isReadOnly ? ', read-only' : ''}, ${sizeOf(fileSystem.freeBytes)} free`,
    ],
    ['overlay upper', verdict(report.canBeOverlayUpper)],
    ['overlay upper (userxattr)', verdict(report.canBeOverlayUpperByUserXattrs)],
    ['overlay lower', verdict(report.canBeOverlayLower)],
    ...Object.entries(report.abilities).map(([name, found]): [string, string] => [words(name), finding(found)]),
    ...Object.entries(limits).map(([name, found]): [string, string] => [words(name), finding(found)]),
  ]
  return [bold(printable(dir)), ...rows.map(([name, value]) => `  ${name.padEnd(28)}${value}`)].join('\n')
}

function verdict({ ok, missing, unknown }: Verdict): string {
  if (ok) return 'yes'
  return unknown === undefined ? `no: ${missing.join(', ')}` : `unknown: ${unknown}`
}

function finding({ value, reason }: Finding<boolean | number>): string {
  const word = value === true ? 'yes' : value === false ? 'no' : String(value)
  return reason === undefined ? word : `${word}: ${reason}`
}

// renameNoReplace → rename no replace: the names of the report, readable.
function words(name: string): string {
  return name.replace(/[A-Z]|\d+/g, (part) => ` ${part.toLowerCase()}`)
}
