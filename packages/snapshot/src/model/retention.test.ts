import type { ByteString } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { applyRules, groupSnapshots, hasRules, type KeepRules, parseDuration } from './retention.ts'
import type { Snapshot } from './snapshot.ts'

function at(time: string, more: Partial<Snapshot> = {}): Snapshot {
  return {
    id: time,
    time,
    parent: undefined,
    tree: '',
    paths: ['/a' as ByteString],
    hostname: 'h',
    username: '',
    uid: 0,
    gid: 0,
    excludes: [],
    tags: [],
    original: undefined,
    others: {},
    ...more,
  }
}

const NOW = BigInt(Date.parse('2030-01-01')) * 1_000_000n

function kept(rules: KeepRules, ...snapshots: Snapshot[]): string[] {
  return applyRules(snapshots, rules, NOW)
    .filter(({ reasons }) => reasons.length > 0)
    .map(({ snapshot }) => snapshot.time)
}

describe('the rules', () => {
  test('last counts snapshots, newest first', () => {
    const three = ['2020-01-01T00:00:00Z', '2020-01-03T00:00:00Z', '2020-01-02T00:00:00Z'].map((time) => at(time))
    expect(kept({ last: 2 }, ...three)).toEqual(['2020-01-03T00:00:00Z', '2020-01-02T00:00:00Z'])
  })

  test('daily goes by the clock where the snapshot was made', () => {
    const evening = at('2020-01-01T23:30:00-08:00')
    const morning = at('2020-01-02T08:30:00+00:00')
    const oldest = at('2019-01-02T08:30:00+00:00')
    expect(kept({ daily: 2 }, evening, morning, oldest)).toEqual([morning.time, evening.time].sort().reverse())
  })

  test('weeks begin on Monday, also across years', () => {
    const [sunday, monday, next, old] = ['2018-12-30', '2018-12-31', '2019-01-06', '2010-01-01'].map((date) =>
      at(`${date}T12:00:00Z`),
    ) as [Snapshot, Snapshot, Snapshot, Snapshot]
    expect(kept({ weekly: 2 }, sunday, monday, next, old)).toEqual([next.time, sunday.time])
  })

  test('without any rule everything is kept', () => {
    expect(kept({}, at('2020-01-01T00:00:00Z'))).toHaveLength(1)
    expect(kept({ last: 0, within: parseDuration('0d') }, at('2020-01-01T00:00:00Z'))).toHaveLength(1)
    expect(hasRules({ tags: [] })).toBe(false)
    expect(hasRules({ tags: [['a']] })).toBe(true)
  })

  test('a month before the 31st is where Go puts it', () => {
    const latest = at('2021-03-31T00:00:00Z')
    // The 31st of February is the 3rd of March.
    expect(kept({ within: parseDuration('1m') }, latest, at('2021-03-03T00:00:00Z'))).toEqual([latest.time])
    expect(kept({ within: parseDuration('1m') }, latest, at('2021-03-03T00:00:01Z'))).toHaveLength(2)
  })

  test('snapshots from the future are not what others are measured by', () => {
    const [future, latest, old] = ['2099-01-01', '2020-01-02', '2020-01-01'].map((date) => at(`${date}T00:00:00Z`)) as [
      Snapshot,
      Snapshot,
      Snapshot,
    ]
    expect(kept({ within: parseDuration('1h') }, future, latest, old)).toEqual([future.time, latest.time])
  })
})

test('groups are made by host, paths and tags, whatever the order', () => {
  const one = at('1', { tags: ['a', 'b'] })
  const two = at('2', { tags: ['b', 'a'] })
  const three = at('3', { hostname: 'other' })
  expect(groupSnapshots([one, two, three], ['host']).map(({ snapshots }) => snapshots.length)).toEqual([2, 1])
  expect(groupSnapshots([one, two, three], ['tags']).map(({ snapshots }) => snapshots.length)).toEqual([2, 1])
  expect(groupSnapshots([one, two, three], [])).toHaveLength(1)
})

test.each([
  ['1y5m7d2h', { years: 1, months: 5, days: 7, hours: 2 }],
  ['3d', { years: 0, months: 0, days: 3, hours: 0 }],
])('%s is a span of time', (text, span) => expect(parseDuration(text)).toEqual(span))

test.each(['', '5', '1h2d', 'd', '-1d', '1w'])('%j is none', (text) => {
  expect(() => parseDuration(text)).toThrow(expect.objectContaining({ code: 'DURATION_INVALID' }))
})
