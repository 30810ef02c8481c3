import type { CommandShape, OperandShape, OptionShape } from './command-shape.ts'

/** The completion script for zsh: to be sourced, or as the file `_lsync` in a directory of `fpath`. */
export function zshCompletion(root: CommandShape): string {
  return `#compdef lsync
# zsh completion of lsync: source <(lsync completion zsh)
${functions(root)}
if [ "\${funcstack[1]}" = _lsync ]; then _lsync "$@"; else compdef _lsync lsync; fi
`
}

function functions(shape: CommandShape): string {
  return [...shape.children.map(functions), functionOf(shape)].join('\n')
}

function functionOf(shape: CommandShape): string {
  const { options, operands, children } = shape
  const specs = options.map(optionSpec)
  if (children.length === 0) {
    const places = operands.map((operand, index) => quoted(`${index + 1}:${operand.name}:${action(operand)}`))
    return `${nameOf(shape)}() {
  _arguments ${[...specs, ...places].join(' \\\n    ')}
}`
  }
  const described = children.map((child) => quoted(`${child.words.at(-1)}:${child.summary.replaceAll(':', '\\:')}`))
  const cases = children.map((child) => `        ${child.words.at(-1)}) ${nameOf(child)} ;;`)
  return `${nameOf(shape)}() {
  local state line
  local -a commands=(
    ${described.join('\n    ')}
  )
  _arguments -C ${[...specs, "'1:command:->command'", "'*::argument:->arguments'"].join(' \\\n    ')}
  case $state in
    command) _describe -t commands command commands ;;
    arguments)
      case $line[1] in
${cases.join('\n')}
      esac
      ;;
  esac
}`
}

function nameOf({ words }: CommandShape): string {
  return ['_lsync', ...words].join('_')
}

function optionSpec({ long, summary, isRepeatable, value }: OptionShape): string {
  const said = summary.replace(/[[\]\\:]/g, '\\$&')
  const after = value === undefined ? '' : `:${value.name}:${action(value)}`
  return quoted(`${isRepeatable ? '*' : ''}${long}[${said}]${after}`)
}

function action({ choices, path }: OperandShape): string {
  if (choices.length > 0) return `(${choices.join(' ')})`
  return path === 'directory' ? '_files -/' : path === 'file' ? '_files' : ' '
}

function quoted(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`
}
