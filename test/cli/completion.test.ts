import { spawnSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { commands } from '../../packages/cli/src/commands.ts'
import { needs } from '../support/needs.ts'
import { isPresent } from '../support/system.ts'
import { freshDirectory, lsync } from './lsync.ts'

function run(shell: string, args: readonly string[], script: string, cwd?: string): string[] {
  const { stdout, stderr, status } = spawnSync(shell, [...args, script], { cwd, encoding: 'utf8' })
  expect({ stderr, status }).toEqual({ stderr: '', status: 0 })
  return stdout.split('\n').filter((line) => line !== '')
}

describe('the completion for bash', () => {
  const script = lsync(['completion', 'bash']).stdout

  function complete(words: readonly string[], cwd?: string): string[] {
    const list = words.map((word) => `'${word}'`).join(' ')
    // Outside of a real completion there are no options of it to set.
    const line = `compopt() { :; }\n${script}\nCOMP_WORDS=(lsync ${list}) COMP_CWORD=${words.length}\n_lsync\nprintf '%s\\n' "\${COMPREPLY[@]}"`
    return run('bash', ['--norc', '-c'], line, cwd)
  }

  test('is registered for lsync', () => {
    expect(run('bash', ['--norc', '-c'], `${script}\ncomplete -p lsync`)).toEqual(['complete -F _lsync lsync'])
  })

  test('offers the commands', () => {
    expect(complete([''])).toEqual(expect.arrayContaining(Object.keys(commands)))
    expect(complete(['merg'])).toEqual(['merge'])
  })

  test('offers options, their choices, and directories', () => {
    expect(complete(['merge', '--in'])).toEqual(['--in-place'])
    expect(complete(['merge', '--clone', 'r'])).toEqual(['reflink'])
    const cwd = freshDirectory()
    mkdirSync(`${cwd}/a directory`)
    writeFileSync(`${cwd}/a file`, '')
    expect(complete(['merge', '--upper', 'a'], cwd)).toEqual(['a directory'])
    expect(complete(['recover', 'a'], cwd)).toEqual(['a directory'])
  })
})

test.skipIf(!needs('zsh', isPresent('zsh')))('the completion for zsh loads and is registered', () => {
  const script = lsync(['completion', 'zsh']).stdout
  const loaded = run('zsh', ['-f', '-c'], `autoload -U compinit; compinit -u -D\n${script}\nprint -r -- $_comps[lsync]`)
  expect(loaded).toEqual(['_lsync'])
})

test.skipIf(!needs('fish', isPresent('fish')))('the completion for fish offers commands, options and choices', () => {
  const script = lsync(['completion', 'fish']).stdout
  const complete = (line: string) =>
    run('fish', ['--no-config', '-c'], `${script}\ncomplete -C '${line}'`).map((found) => found.split('\t')[0])
  expect(complete('lsync ')).toEqual(expect.arrayContaining(Object.keys(commands)))
  expect(complete('lsync merge --in')).toEqual(['--in-place'])
  expect(complete('lsync merge --clone r')).toEqual(['reflink'])
})
