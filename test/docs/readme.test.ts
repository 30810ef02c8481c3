import { spawnSync } from 'node:child_process'
import { existsSync, globSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, normalize } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, test } from 'vitest'
import { commands } from '../../packages/cli/src/commands.ts'
import { needs } from '../support/needs.ts'
import { isPresent, run } from '../support/system.ts'

const root = fileURLToPath(new URL('../..', import.meta.url)).replace(/\/$/, '')
const pages = globSync(['*.md', 'docs/**/*.md', 'packages/*/README.md', 'examples/*/README.md', 'bench/README.md'], {
  cwd: root,
}).sort()
const textOf = (page: string) => readFileSync(join(root, page), 'utf8')

/** A fenced block, and the `text` block right after it, which is what it prints. */
interface Block {
  readonly page: string
  readonly language: string
  readonly info: readonly string[]
  readonly code: string
  readonly output: string | undefined
}

function blocksOf(page: string): Block[] {
  const blocks = /^```(\w+)(.*)\n([\s\S]*?)^```$(?:\n\n```text\n([\s\S]*?)^```$)?/gm
  return [...textOf(page).matchAll(blocks)].map(([, language = '', info = '', code = '', output]) => ({
    page,
    language,
    info: info.trim().split(/\s+/),
    code,
    output,
  }))
}

const blocks = pages.flatMap(blocksOf).filter(({ info }) => info.includes('run'))

const temporary: string[] = []
afterAll(() => {
  for (const path of temporary) rmSync(path, { recursive: true, force: true })
})

function temporaryDirectory(): string {
  const path = mkdtempSync(join(tmpdir(), 'lsync-docs-'))
  temporary.push(path)
  return path
}

/** The start of a command line that runs the rest without any privilege. */
function unprivileged(): string[] {
  if (process.geteuid?.() !== 0) return []
  const asNobody = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups']
  const [command = '', ...args] = asNobody
  // A checkout in a home that others may not enter: then as its owner, but without a capability.
  const mayRead = spawnSync(command, [...args, 'test', '-x', join(root, 'node_modules/.bin/lsync')]).status === 0
  return mayRead ? asNobody : ['setpriv', '--bounding-set=-all', '--inh-caps=-all', '--no-new-privs']
}

/** Matches the whole of what was printed; `…` stands for anything within a line, alone on a line for any lines. */
function pattern(output: string): RegExp {
  const lines = output.split('\n').map((line) => {
    if (line === '…') return '(?:.*\\n)*?'
    const literal = line.replace(/[.*+?^${}()|[\]\\]/g, '\\$&').replaceAll('…', '.*')
    return line === '' ? '' : `${literal}\\n`
  })
  return new RegExp(`^${lines.join('')}$`)
}

describe('the blocks to paste', () => {
  const shell = blocks.filter(({ language }) => language === 'sh')

  test('there are some in the README, the first right at its beginning', () => {
    expect(textOf('README.md').indexOf('```sh run')).toBeLessThan(500)
    expect(shell.filter(({ page }) => page === 'README.md').length).toBeGreaterThan(1)
  })

  for (const [index, { page, code, info, output }] of shell.entries()) {
    const tool = info.find((word) => word.startsWith('needs='))?.slice('needs='.length)
    const isReady = tool === undefined || needs(tool, isPresent(tool))
    test.skipIf(!isReady)(`${page}, shell block ${index + 1}, runs without privilege and prints what it says`, () => {
      const [command = '', ...args] = [...unprivileged(), 'sh', '-euc', code]
      const { status, stdout, stderr } = spawnSync(command, args, { cwd: root, encoding: 'utf8', timeout: 60_000 })
      expect({ status, stderr }).toEqual({ status: 0, stderr: expect.not.stringContaining('lsync: ') })
      if (output !== undefined) expect(stdout).toMatch(pattern(output))
    })
  }
})

describe('the programs', () => {
  for (const [index, { page, code }] of blocks.filter(({ language }) => language === 'ts').entries()) {
    test(`${page}, program ${index + 1}, runs`, () => {
      const directory = temporaryDirectory()
      for (const path of ['lower/etc', 'upper/etc', 'node_modules'])
        mkdirSync(join(directory, path), { recursive: true })
      writeFileSync(join(directory, 'lower/etc/a'), 'below\n')
      writeFileSync(join(directory, 'upper/etc/a'), 'above\n')
      symlinkSync(join(root, 'test/node_modules/@lsync'), join(directory, 'node_modules/@lsync'))
      writeFileSync(join(directory, 'program.ts'), code.replaceAll("'/srv", `'${directory}`))
      writeFileSync(join(directory, 'package.json'), '{"type":"module"}')
      expect(run(process.execPath, join(directory, 'program.ts'))).not.toBe('')
      const merged = join(directory, code.includes("'/srv/next'") ? 'next/etc/a' : 'lower/etc/a')
      if (code.includes('merge(')) expect(readFileSync(merged, 'utf8')).toBe('above\n')
    })
  }
})

test('the README names every command, and no other', () => {
  const named = [...textOf('README.md').matchAll(/^\| `lsync (\w+)` \|/gm)].map(([, name]) => name)
  expect(named.sort()).toEqual(Object.keys(commands).sort())
})

/** The anchor that a heading gets. */
function anchorOf(heading: string): string {
  return heading
    .toLowerCase()
    .replace(/[^\p{L}\p{N}\s_-]/gu, '')
    .replaceAll(' ', '-')
}

function anchorsOf(page: string): string[] {
  return [...textOf(page).matchAll(/^#+ (.*)$/gm)].map(([, heading = '']) => anchorOf(heading))
}

describe.each(pages)('%s', (page) => {
  const prose = textOf(page).replace(/^```[\s\S]*?^```$/gm, '')

  test('its links lead to files and headings that are there', () => {
    const broken = [...prose.matchAll(/\]\(([^)\s]+)\)/g)]
      .map(([, link = '']) => link)
      .filter((link) => !/^[a-z]+:/.test(link))
      .filter((link) => {
        const [path = '', anchor] = link.split('#')
        const target = path === '' ? page : normalize(join(dirname(page), path))
        if (!existsSync(join(root, target))) return true
        return anchor !== undefined && !anchorsOf(target).includes(anchor)
      })
    expect(broken).toEqual([])
  })

  test('the files of the repository that it names are there', () => {
    const named = [...textOf(page).matchAll(/(?<![\w/.-])((?:packages|bench|docs|scripts|test)\/[\w./-]*\w)/g)]
    const missing = named.map(([, path = '']) => path).filter((path) => !existsSync(join(root, path)))
    expect(missing).toEqual([])
  })
})

test('decisions are numbered without a gap, and say what was decided', () => {
  const decisions = pages.filter((page) => page.startsWith('docs/decisions/'))
  for (const [index, page] of decisions.entries()) {
    const number = String(index + 1)
    expect(page).toMatch(new RegExp(`/${number.padStart(4, '0')}-[a-z0-9-]+\\.md$`))
    const text = textOf(page)
    expect(text).toMatch(new RegExp(`^# ${number}\\. `))
    for (const heading of ['Context', 'Decision', 'Consequences', 'Rejected']) expect(text).toContain(`## ${heading}\n`)
  }
  expect(decisions.length).toBeGreaterThan(0)
})
