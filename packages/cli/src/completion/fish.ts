import { type CommandShape, flatten, type OperandShape } from './command-shape.ts'

/** The completion script for fish. */
export function fishCompletion(root: CommandShape): string {
  const lines = flatten(root).flatMap((shape) => [...childLines(shape), ...optionLines(shape), ...operandLines(shape)])
  return `# fish completion of lsync: lsync completion fish | source
complete -c lsync -f
${lines.join('\n')}
`
}

function childLines(shape: CommandShape): string[] {
  const names = shape.children.map(({ words }) => words.at(-1))
  return shape.children.map(({ words, summary }) => {
    const when = quoted(`${condition(shape)}; and not __fish_seen_subcommand_from ${names.join(' ')}`)
    return `complete -c lsync -n ${when} -a ${words.at(-1)} -d ${quoted(summary)}`
  })
}

function optionLines(shape: CommandShape): string[] {
  return shape.options.map(({ long, summary, value }) => {
    const when = quoted(shape.words.length === 0 ? '__fish_use_subcommand' : condition(shape))
    const after = value === undefined ? '' : ` -r${candidates(value)}`
    return `complete -c lsync -n ${when} -l ${long.slice(2)} -d ${quoted(summary)}${after}`
  })
}

function operandLines(shape: CommandShape): string[] {
  const [operand] = shape.operands
  if (operand === undefined || shape.children.length > 0) return []
  return [`complete -c lsync -n ${quoted(condition(shape))}${candidates(operand)}`]
}

function candidates({ choices, path }: OperandShape): string {
  if (choices.length > 0) return ` -f -a ${quoted(choices.join(' '))}`
  if (path === undefined) return ''
  return path === 'directory' ? " -f -a '(__fish_complete_directories)'" : ' -F'
}

function condition({ words }: CommandShape): string {
  return words.length === 0 ? 'true' : words.map((word) => `__fish_seen_subcommand_from ${word}`).join('; and ')
}

function quoted(text: string): string {
  return `'${text.replace(/[\\']/g, '\\$&')}'`
}
