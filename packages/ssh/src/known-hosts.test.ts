import { createHmac, randomBytes } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { KnownHosts } from './known-hosts.ts'

const keyA = Buffer.from('a key of 32 bytes, more or less.')
const keyB = Buffer.from('another key, which is not the same')
const line = (hosts: string, key: Buffer, type = 'ssh-ed25519') => `${hosts} ${type} ${key.toString('base64')} comment`

function hashed(name: string): string {
  const salt = randomBytes(20)
  const hash = createHmac('sha1', salt).update(name).digest('base64')
  return `|1|${salt.toString('base64')}|${hash}`
}

const judge = (lines: string[], host: string, port = 22, key = keyA) =>
  new KnownHosts([lines.join('\n')]).judge(host, port, key)

describe('a host key', () => {
  test('is known by name, by address and by pattern', () => {
    expect(judge([line('host,10.0.0.1', keyA)], 'HOST')).toBe('known')
    expect(judge([line('host,10.0.0.1', keyA)], '10.0.0.1')).toBe('known')
    expect(judge([line('*.lab.example,!evil.lab.example', keyA)], 'n1.lab.example')).toBe('known')
    expect(judge([line('*.lab.example,!evil.lab.example', keyA)], 'evil.lab.example')).toBe('unknown')
    expect(judge([line('node?', keyA)], 'node7')).toBe('known')
    expect(judge([line('node?', keyA)], 'node77')).toBe('unknown')
  })

  test('is known by a hashed name, with and without a port', () => {
    expect(judge([line(hashed('host'), keyA)], 'host')).toBe('known')
    expect(judge([line(hashed('host'), keyA)], 'other')).toBe('unknown')
    expect(judge([line(hashed('[host]:2222'), keyA)], 'host', 2222)).toBe('known')
    expect(judge([line(hashed('[host]:2222'), keyA)], 'host', 22)).toBe('unknown')
  })

  test('belongs to one port', () => {
    expect(judge([line('[host]:2222', keyA)], 'host', 2222)).toBe('known')
    expect(judge([line('[host]:2222', keyA)], 'host', 2223)).toBe('unknown')
    expect(judge([line('host', keyA)], 'host', 2222)).toBe('unknown')
  })

  test('that differs from the known one has changed', () => {
    expect(judge([line('host', keyB)], 'host')).toBe('changed')
    expect(judge([line('host', keyB, 'ssh-rsa')], 'host')).toBe('changed')
    expect(judge([line('host', keyB), line('host', keyA)], 'host')).toBe('known')
  })

  test('that is revoked is refused, also where it is known', () => {
    expect(judge([line('host', keyA), line('@revoked *', keyA)], 'host')).toBe('revoked')
    expect(judge([line('host', keyA), line('@revoked *', keyB)], 'host')).toBe('known')
  })

  test('is not known by an authority alone', () => {
    expect(judge([line('@cert-authority *', keyA)], 'host')).toBe('authority')
    expect(judge([line('@cert-authority *', keyB)], 'host')).toBe('authority')
    expect(judge([line('@cert-authority *', keyB), line('host', keyA)], 'host')).toBe('known')
  })

  test('comments, empty lines, unknown markers and broken lines say nothing', () => {
    expect(
      judge(['# host ssh-ed25519 AAAA', '', 'host', '|2|x|y ssh-ed25519 AAAA', `@new ${line('host', keyA)}`], 'host'),
    ).toBe('unknown')
  })

  test('a pattern of many stars takes no time', () => {
    expect(judge([line(`${'*a'.repeat(200)}b`, keyA)], 'a'.repeat(2000))).toBe('unknown')
  })

  test('the types that are known for a host are told', () => {
    const hosts = new KnownHosts([line('host', keyA, 'ssh-rsa'), line('host,x', keyB), line('@revoked host', keyA)])
    expect(hosts.typesFor('host', 22)).toEqual(['ssh-rsa', 'ssh-ed25519'])
    expect(hosts.typesFor('nobody', 22)).toEqual([])
  })
})
