import type { Argument, Command, Option } from 'commander'

/** What a shell must know of one command. */
export interface CommandShape {
  /** `['layer', 'import']`; empty for lsync itself. */
  readonly words: readonly string[]
  readonly summary: string
  readonly options: readonly OptionShape[]
  readonly operands: readonly OperandShape[]
  readonly children: readonly CommandShape[]
}

export interface OptionShape {
  /** With its dashes. */
  readonly long: string
  readonly summary: string
  readonly isRepeatable: boolean
  /** What follows it; `undefined` for nothing. */
  readonly value: OperandShape | undefined
}

export interface OperandShape {
  readonly name: string
  readonly choices: readonly string[]
  /** Directories, any file, or nothing that a shell could know. */
  readonly path: 'directory' | 'file' | undefined
}

/** The shape of a command and of all below it. */
export function shapeOf(command: Command, words: readonly string[] = []): CommandShape {
  return {
    words,
    summary: command.description(),
    options: command
      .createHelp()
      .visibleOptions(command)
      .flatMap((option) => optionShape(option)),
    operands: command.registeredArguments.map((argument) => operandShape(argument.name(), argument)),
    children: command.commands.map((child) => shapeOf(child, [...words, child.name()])),
  }
}

/** A command and all below it, parents first. */
export function flatten(shape: CommandShape): CommandShape[] {
  return [shape, ...shape.children.flatMap(flatten)]
}

function optionShape(option: Option): OptionShape[] {
  const { long, description, flags } = option
  if (long === undefined || long === null) return []
  const name = /<([^>]+)>/.exec(flags)?.[1]
  const isRepeatable = REPEATABLE.has(long)
  return [
    { long, summary: description, isRepeatable, value: name === undefined ? undefined : operandShape(name, option) },
  ]
}

const REPEATABLE = new Set([
  '--exclude',
  '--exclude-file',
  '--include',
  '--host',
  '--tag',
  '--path',
  '--keep-tag',
  '--lower',
  '--data',
  '--beneath',
])

function operandShape(name: string, { argChoices }: Option | Argument): OperandShape {
  const path = name === 'dir' ? 'directory' : FILES.has(name) ? 'file' : undefined
  return { name, choices: argChoices ?? [], path }
}

const FILES = new Set(['from', 'to', 'file', 'plan'])
