import { createWriteStream } from 'node:fs'
import {
  type ConvertProgress,
  type ConvertReport,
  exportLayer,
  importLayer,
  type LayerForm,
  type Namespace,
} from '@lsync/overlay-merge'
import { type HostPath, printable, textOf } from '@lsync/posix'
import { type Command, Option } from 'commander'
import { examples } from '../examples.ts'
import { EXIT, UsageError } from '../failure.ts'
import { addNamespaceOption, countArgument, given, pathArgument, pathsArgument } from '../options.ts'
import { countOf, sizeOf } from '../progress-line.ts'
import type { Session } from '../session.ts'

interface ConvertOptions {
  readonly form: LayerForm
  readonly namespace: Namespace
  readonly lossy?: true
  readonly devices: 'keep' | 'skip' | 'refuse'
  readonly setuid: 'keep' | 'clear' | 'refuse'
}

interface ImportOptions extends ConvertOptions {
  readonly toForm?: LayerForm
  readonly beneath?: HostPath[]
}

interface ExportOptions extends ConvertOptions {
  readonly fromForm?: LayerForm
  readonly compression: 'none' | 'gzip' | 'zstd'
  readonly level?: number
  readonly sparse?: true
}

const ARCHIVES = ['tar', 'oci', 'plain-tar']
const WRITTEN = [...ARCHIVES, 'kernel-trusted', 'kernel-user', 'xattr-whiteouts', 'aufs', 'plain', 'portable']
const READ = [...WRITTEN, 'fuse-overlayfs']

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync layer import --form oci layer.tar.gz /srv/up',
      'lsync layer export --form tar --compression zstd /srv/up up.tar.zst',
    ),
  )
  defineImport(command.command('import').description('make a kernel layer of one in another form'), session)
  defineExport(command.command('export').description('write a kernel layer in another form'), session)
}

function defineImport(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync layer import --form oci layer.tar.gz /srv/up',
        'zstdcat up.tar.zst | lsync layer import --form tar - /srv/up',
      ),
    )
    .argument('<from>', 'a directory or an archive; - is standard input')
    .argument('<to>', 'the layer to make; not there yet', pathArgument)
  addConvertOptions(command, READ)
    .addOption(new Option('--to-form <form>', 'what to make, if not a kernel layer').choices(WRITTEN))
    .option('--beneath <dir>', 'a layer below: directories that an archive only implies are as there', pathsArgument)
    .action(async (from: string, to: HostPath, options: ImportOptions) => {
      const { beneath, toForm, ...others } = options
      const report = await importLayer({
        ...others,
        ...given({ beneath, toForm }),
        from: from === '-' ? process.stdin : pathArgument(from),
        to,
        signal: session.signal,
        onProgress: progressOf(session),
      })
      render(report, to, session)
    })
}

function defineExport(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync layer export --form oci --compression gzip /srv/up up.tar.gz',
        'lsync layer export --form tar /srv/up - | ssh node …',
      ),
    )
    .argument('<from>', 'a layer', pathArgument)
    .argument('<to>', 'the directory or archive to make; - is standard output')
  addConvertOptions(command, WRITTEN)
    .addOption(new Option('--from-form <form>', 'what <from> is, if not a kernel layer').choices(READ))
    .addOption(new Option('--compression <kind>', 'of an archive').choices(['none', 'gzip', 'zstd']).default('none'))
    .option('--level <level>', 'of the compression', countArgument)
    .option('--sparse', 'keep holes in an archive, which not every reader of images understands')
    .action(async (from: HostPath, to: string, options: ExportOptions) => {
      const { fromForm, level, sparse, ...others } = options
      const isStream = to === '-'
      if (isStream && !ARCHIVES.includes(others.form)) {
        throw new UsageError(`the form ${others.form} is a directory`, 'name a path instead of -')
      }
      const report = await exportLayer({
        ...others,
        ...given({ fromForm, level, sparse }),
        from,
        to: isStream ? createWriteStream('', { fd: 1, autoClose: false }) : pathArgument(to),
        signal: session.signal,
        onProgress: progressOf(session),
      })
      // Standard output is the archive, so that the report has no place there.
      if (!isStream) render(report, pathArgument(to), session)
      else warnOfLosses(report, session)
    })
}

function addConvertOptions(command: Command, forms: readonly string[]): Command {
  return addNamespaceOption(command)
    .addOption(new Option('--form <form>', 'the other form').choices(forms).makeOptionMandatory())
    .option('--lossy', 'leave out what the target cannot hold, and say so, instead of failing')
    .addOption(
      new Option('--devices <policy>', 'block and character devices')
        .choices(['keep', 'skip', 'refuse'])
        .default('keep'),
    )
    .addOption(
      new Option('--setuid <policy>', 'setuid, setgid and capabilities')
        .choices(['keep', 'clear', 'refuse'])
        .default('keep'),
    )
}

function progressOf(session: Session): (progress: ConvertProgress) => void {
  return ({ phase, entries }) => session.output.progress({ phase, done: entries })
}

function render(report: ConvertReport, to: HostPath, session: Session): void {
  const { entries, bytes, archive, losses } = report
  session.output.data(
    () => ({ type: 'layer', target: textOf(to), entries, bytes, losses: losses.length, ...archiveOf(archive) }),
    () => {
      const digest = archive === undefined ? '' : `, ${sizeOf(archive.bytes)} as ${archive.digest}`
      return `made ${printable(to)}: ${countOf(entries)} entries, ${sizeOf(bytes)} of content${digest}`
    },
  )
  warnOfLosses(report, session)
}

function archiveOf(archive: ConvertReport['archive']): object {
  return archive === undefined ? {} : { archive }
}

function warnOfLosses({ losses }: ConvertReport, session: Session): void {
  for (const { path, what } of losses) {
    session.output.warning('LOSS', `${printable(path) || '.'}: left out: ${what}`, { path: textOf(path), what })
  }
  if (losses.length > 0) session.exitCode = EXIT.problems
}
