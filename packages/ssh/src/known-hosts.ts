import { createHmac, timingSafeEqual } from 'node:crypto'

/** What known_hosts files say of a host's key. Source: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT". */
export type HostKeyVerdict =
  | 'known'
  /** The host has other keys, but not this one. */
  | 'changed'
  | 'revoked'
  /** Only the keys of certificate authorities are known for it, and ssh2 knows no certificates. */
  | 'authority'
  | 'unknown'

interface KnownHost {
  readonly marker: 'revoked' | 'cert-authority' | undefined
  readonly patterns: string
  readonly type: string
  readonly key: string
}

/** The content of known_hosts files, in their order. */
export class KnownHosts {
  readonly #hosts: readonly KnownHost[]

  constructor(texts: readonly string[]) {
    this.#hosts = texts.flatMap((text) => text.split('\n')).flatMap((line) => parseLine(line) ?? [])
  }

  /** Key types that are known for a host, to be asked for first; without those of authorities. */
  typesFor(host: string, port: number): string[] {
    const name = hostName(host, port)
    const found = this.#hosts.filter((entry) => entry.marker === undefined && matches(entry.patterns, name))
    return [...new Set(found.map(({ type }) => type))]
  }

  /** Judges the public key (in its wire form) that a host shows. */
  judge(host: string, port: number, key: Buffer): HostKeyVerdict {
    const name = hostName(host, port)
    const shown = key.toString('base64').replace(/=+$/, '')
    const found = this.#hosts.filter(({ patterns }) => matches(patterns, name))
    const same = found.filter((entry) => entry.key === shown)
    if (same.some(({ marker }) => marker === 'revoked')) return 'revoked'
    if (same.some(({ marker }) => marker === undefined)) return 'known'
    if (found.some(({ marker }) => marker === undefined)) return 'changed'
    return found.some(({ marker }) => marker === 'cert-authority') ? 'authority' : 'unknown'
  }
}

/** As known_hosts has it: `host`, or `[host]:port` where the port is not 22. */
export function hostName(host: string, port: number): string {
  const lower = host.toLowerCase()
  return port === 22 ? lower : `[${lower}]:${port}`
}

function parseLine(line: string): KnownHost | undefined {
  const words = line.trim().split(/[ \t]+/)
  const marker = words[0]?.startsWith('@') === true ? words.shift()?.slice(1) : undefined
  const [patterns, type, key] = words
  if (patterns === undefined || patterns.startsWith('#') || type === undefined || key === undefined) return undefined
  // A marker that is unknown may restrict what we cannot know.
  if (marker !== undefined && marker !== 'revoked' && marker !== 'cert-authority') return undefined
  return { marker, patterns, type, key: key.replace(/=+$/, '') }
}

function matches(patterns: string, name: string): boolean {
  if (patterns.startsWith('|')) return matchesHash(patterns, name)
  let isMatch = false
  for (const pattern of patterns.split(',')) {
    const isNegated = pattern.startsWith('!')
    if (!globMatches((isNegated ? pattern.slice(1) : pattern).toLowerCase(), name)) continue
    if (isNegated) return false
    isMatch = true
  }
  return isMatch
}

function matchesHash(pattern: string, name: string): boolean {
  const [, version, salt = '', hash = ''] = pattern.split('|')
  if (version !== '1') return false
  const expected = Buffer.from(hash, 'base64')
  const actual = createHmac('sha1', Buffer.from(salt, 'base64')).update(name).digest()
  return expected.length === actual.length && timingSafeEqual(expected, actual)
}

// Not a regular expression: a pattern of many stars must not take forever.
function globMatches(pattern: string, name: string): boolean {
  let at = 0
  let star = -1
  let resume = 0
  let position = 0
  while (position < name.length) {
    const wanted = pattern[at]
    if (wanted === '*') {
      star = at++
      resume = position
    } else if (wanted === '?' || wanted === name[position]) {
      at++
      position++
    } else if (star >= 0) {
      at = star + 1
      position = ++resume
    } else return false
  }
  while (pattern[at] === '*') at++
  return at === pattern.length
}
