import { LsyncError } from '@lsync/posix'
import { parseTime } from './go-text.ts'
import type { Snapshot } from './snapshot.ts'

/** A span of calendar time: months are months. */
export interface Duration {
  readonly years: number
  readonly months: number
  readonly days: number
  readonly hours: number
}

/** Which snapshots to keep; any rule that fits keeps one. Numbers count snapshots, -1 means all. */
export interface KeepRules {
  readonly last?: number
  readonly hourly?: number
  readonly daily?: number
  readonly weekly?: number
  readonly monthly?: number
  readonly yearly?: number
  readonly within?: Duration
  readonly withinHourly?: Duration
  readonly withinDaily?: Duration
  readonly withinWeekly?: Duration
  readonly withinMonthly?: Duration
  readonly withinYearly?: Duration
  /** With all tags of one of these lists. */
  readonly tags?: readonly (readonly string[])[]
}

/** One snapshot of a group, and why it is kept; no reason: it goes. */
export interface Verdict {
  readonly snapshot: Snapshot
  readonly reasons: readonly string[]
}

/** What snapshots are put together by, before the rules are applied to each group. */
export type GroupKey = 'host' | 'paths' | 'tags'

/** Snapshots that have the same of each key. */
export interface SnapshotGroup {
  readonly host: string | undefined
  readonly paths: readonly string[] | undefined
  readonly tags: readonly string[] | undefined
  readonly snapshots: readonly Snapshot[]
}

/** A span of time cannot be read. */
export class DurationInvalidError extends LsyncError {
  constructor(text: string) {
    super('DURATION_INVALID', `${text} is no span of time`, { hint: 'write it as 1y5m7d2h, parts as needed' })
  }
}

/**
 * Reads a span such as `1y5m7d2h`.
 * @throws {DurationInvalidError}
 */
export function parseDuration(text: string): Duration {
  const found = /^(?=.)(?:(\d{1,6})y)?(?:(\d{1,6})m)?(?:(\d{1,6})d)?(?:(\d{1,6})h)?$/.exec(text)
  if (found === null) throw new DurationInvalidError(text)
  const [years = 0, months = 0, days = 0, hours = 0] = found.slice(1).map((part) => Number(part ?? 0))
  return { years, months, days, hours }
}

/** Divides snapshots into groups, in the order of their first ones. */
export function groupSnapshots(snapshots: readonly Snapshot[], keys: readonly GroupKey[]): SnapshotGroup[] {
  const groups = new Map<string, SnapshotGroup & { snapshots: Snapshot[] }>()
  for (const snapshot of snapshots) {
    const host = keys.includes('host') ? snapshot.hostname : undefined
    const paths = keys.includes('paths') ? [...snapshot.paths].sort() : undefined
    const tags = keys.includes('tags') ? [...snapshot.tags].sort() : undefined
    const key = JSON.stringify([host, paths, tags])
    const group = groups.get(key) ?? { host, paths, tags, snapshots: [] }
    groups.set(key, group)
    group.snapshots.push(snapshot)
  }
  return [...groups.values()]
}

type Bucket = (clock: Clock, place: number) => number

/** A moment as the clock where the snapshot was made showed it. */
interface Clock {
  /** The clock's time as if it were UTC. */
  readonly date: Date
  readonly offsetMs: number
  readonly timeNs: bigint
}

const hour: Bucket = ({ date }) => Math.floor(date.getTime() / 3_600_000)
const day: Bucket = ({ date }) => Math.floor(date.getTime() / 86_400_000)
const week: Bucket = ({ date }) => Math.floor((date.getTime() / 86_400_000 + 3) / 7)
const month: Bucket = ({ date }) => date.getUTCFullYear() * 12 + date.getUTCMonth()
const year: Bucket = ({ date }) => date.getUTCFullYear()
const each: Bucket = (_, place) => place

/**
 * Which snapshots of one group the rules keep, newest first. Pure; `nowNs` only keeps snapshots from the future from
 * counting as the latest. Source: restic's `forget`, whose rules and results these are.
 */
export function applyRules(snapshots: readonly Snapshot[], rules: KeepRules, nowNs: bigint): Verdict[] {
  const sorted = snapshots
    .map((snapshot) => ({ snapshot, clock: clockOf(snapshot.time) }))
    .sort((left, right) =>
      left.clock.timeNs > right.clock.timeNs ? -1 : left.clock.timeNs < right.clock.timeNs ? 1 : 0,
    )
  if (!hasRules(rules)) return sorted.map(({ snapshot }) => ({ snapshot, reasons: ['there are no rules'] }))
  const counted = [
    { left: rules.last ?? 0, bucket: each, seen: -1, name: 'last snapshot' },
    { left: rules.hourly ?? 0, bucket: hour, seen: -1, name: 'hourly snapshot' },
    { left: rules.daily ?? 0, bucket: day, seen: -1, name: 'daily snapshot' },
    { left: rules.weekly ?? 0, bucket: week, seen: -1, name: 'weekly snapshot' },
    { left: rules.monthly ?? 0, bucket: month, seen: -1, name: 'monthly snapshot' },
    { left: rules.yearly ?? 0, bucket: year, seen: -1, name: 'yearly snapshot' },
  ]
  const latest = sorted.find(({ clock }) => clock.timeNs < nowNs)?.clock
  const after = (span: Duration | undefined) =>
    span === undefined || latest === undefined ? undefined : before(latest, span)
  const spans = [
    { afterNs: after(rules.within), bucket: each, seen: -1, name: 'within' },
    { afterNs: after(rules.withinHourly), bucket: hour, seen: -1, name: 'hourly within' },
    { afterNs: after(rules.withinDaily), bucket: day, seen: -1, name: 'daily within' },
    { afterNs: after(rules.withinWeekly), bucket: week, seen: -1, name: 'weekly within' },
    { afterNs: after(rules.withinMonthly), bucket: month, seen: -1, name: 'monthly within' },
    { afterNs: after(rules.withinYearly), bucket: year, seen: -1, name: 'yearly within' },
  ]
  return sorted.map(({ snapshot, clock }, place) => {
    const reasons: string[] = []
    for (const list of rules.tags ?? []) {
      if (list.every((tag) => snapshot.tags.includes(tag))) reasons.push(`has tags ${list.join(', ')}`)
    }
    for (const rule of counted) {
      if (rule.left === 0) continue
      const value = rule.bucket(clock, place)
      // The oldest one is kept while a rule is not used up, so that the history reaches as far as it can.
      if (value === rule.seen && place < sorted.length - 1) continue
      rule.seen = value
      if (rule.left > 0) rule.left--
      reasons.push(rule.name)
    }
    for (const rule of spans) {
      if (rule.afterNs === undefined || clock.timeNs <= rule.afterNs) continue
      const value = rule.bucket(clock, place)
      if (value === rule.seen) continue
      rule.seen = value
      reasons.push(rule.name)
    }
    return { snapshot, reasons }
  })
}

/** Whether there is any rule at all. Without one, everything is kept. */
export function hasRules({ tags, ...rules }: KeepRules): boolean {
  const isZero = (rule: number | Duration) => (typeof rule === 'number' ? rule === 0 : isNoTime(rule))
  return (tags?.length ?? 0) > 0 || Object.values(rules).some((rule) => rule !== undefined && !isZero(rule))
}

function isNoTime({ years, months, days, hours }: Duration): boolean {
  return years + months + days + hours === 0
}

function clockOf(time: string): Clock {
  const timeNs = parseTime(time) as bigint
  const [, sign, hours = '0', minutes = '0'] = /(?:([+-])(\d\d):(\d\d))$/.exec(time) ?? []
  const offsetMs = (Number(hours) * 60 + Number(minutes)) * 60_000 * (sign === '-' ? -1 : 1)
  return { timeNs, offsetMs, date: new Date(Number(timeNs / 1_000_000n) + offsetMs) }
}

/** The moment so long before, by the calendar of the same clock; `undefined` for no span. */
function before({ timeNs, offsetMs, date }: Clock, span: Duration): bigint | undefined {
  if (isNoTime(span)) return undefined
  const { years, months, days, hours } = span
  const moved = new Date(date)
  moved.setUTCFullYear(date.getUTCFullYear() - years, date.getUTCMonth() - months, date.getUTCDate() - days)
  const ms = moved.getTime() - offsetMs - hours * 3_600_000
  return BigInt(ms) * 1_000_000n + (((timeNs % 1_000_000n) + 1_000_000n) % 1_000_000n)
}
