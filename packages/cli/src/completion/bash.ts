import { type CommandShape, flatten, type OperandShape } from './command-shape.ts'

/** The completion script for bash; needs no bash-completion package. */
export function bashCompletion(root: CommandShape): string {
  const shapes = flatten(root)
  const parents = shapes.filter(({ children }) => children.length > 0)
  return `# bash completion of lsync: eval "$(lsync completion bash)"
_lsync() {
  local cur=\${COMP_WORDS[COMP_CWORD]} prev=\${COMP_WORDS[COMP_CWORD - 1]} command='' i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$command \${COMP_WORDS[i]}" in
${shapes
  .filter(({ words }) => words.length > 0)
  .map(
    ({ words }) => `      '${[words.slice(0, -1).join(' '), words.at(-1)].join(' ')}') command='${words.join(' ')}' ;;`,
  )
  .join('\n')}
    esac
  done
  COMPREPLY=()
  case "$command $prev" in
${shapes.flatMap(valueCases).join('\n')}
  esac
  if [[ $cur == -* ]]; then
    case "$command" in
${shapes.map(optionCase).join('\n')}
    esac
    return
  fi
  case "$command" in
${parents.map(({ words, children }) => `    '${words.join(' ')}') ${wordsReply(children.map((child) => child.words.at(-1) ?? ''))} ;;`).join('\n')}
${shapes.flatMap(operandCase).join('\n')}
  esac
}
complete -F _lsync lsync
`
}

function valueCases({ words, options }: CommandShape): string[] {
  return options.flatMap(({ long, value }) =>
    value === undefined ? [] : [`    '${words.join(' ')} ${long}') ${reply(value)} return ;;`],
  )
}

function optionCase({ words, options }: CommandShape): string {
  return `      '${words.join(' ')}') ${wordsReply(options.map(({ long }) => long))} ;;`
}

function operandCase({ words, operands, children }: CommandShape): string[] {
  const [operand] = operands
  return operand === undefined || children.length > 0 ? [] : [`    '${words.join(' ')}') ${reply(operand)} ;;`]
}

function reply({ choices, path }: OperandShape): string {
  if (choices.length > 0) return `${wordsReply(choices)};`
  // As whole lines: a name may hold spaces.
  if (path !== undefined) {
    const kind = path === 'directory' ? '-d' : '-f'
    return `compopt -o filenames; mapfile -t COMPREPLY < <(compgen ${kind} -- "$cur");`
  }
  return ''
}

function wordsReply(words: readonly string[]): string {
  return `mapfile -t COMPREPLY < <(compgen -W '${words.join(' ')}' -- "$cur")`
}
