import { type Duration, type KeepRules, parseDuration } from '@lsync/snapshot'
import type { Command } from 'commander'
import { given } from '../../options.ts'
import { keepArgument, tagListsArgument } from './repository.ts'

const COUNTED = ['last', 'hourly', 'daily', 'weekly', 'monthly', 'yearly'] as const
const WITHIN = ['within', 'withinHourly', 'withinDaily', 'withinWeekly', 'withinMonthly', 'withinYearly'] as const

/** The rules as commander gives them. */
export type KeepOptions = { readonly [Name in (typeof COUNTED)[number] as `keep${Capitalize<Name>}`]?: number } & {
  readonly [Name in (typeof WITHIN)[number] as `keep${Capitalize<Name>}`]?: Duration
} & { readonly keepTag?: string[][] }

/** The options of restic's keep-rules. */
export function addKeepOptions(command: Command): Command {
  for (const name of COUNTED) {
    const what = name === 'last' ? 'the last N' : `one snapshot of each of the last N ${PERIODS[name]} that have any`
    command.option(`--keep-${name} <n>`, `keep ${what}; all: no limit`, keepArgument)
  }
  for (const name of WITHIN) {
    const option = name.replace(/[A-Z]/, (letter) => `-${letter.toLowerCase()}`)
    const what = name === 'within' ? 'snapshots' : `${option.slice('within-'.length)} snapshots`
    command.option(
      `--keep-${option} <duration>`,
      `keep ${what} this much older than the latest (1y5m7d2h)`,
      parseDuration,
    )
  }
  return command.option(
    '--keep-tag <tags>',
    'keep snapshots with all these tags (a,b); may be repeated',
    tagListsArgument,
  )
}

const PERIODS = { hourly: 'hours', daily: 'days', weekly: 'weeks', monthly: 'months', yearly: 'years' } as const

/** What the options say. */
export function rulesOf(options: KeepOptions): KeepRules {
  const rules = [...COUNTED, ...WITHIN].map((name) => {
    const option = `keep${name.charAt(0).toUpperCase()}${name.slice(1)}` as keyof KeepOptions
    return [name, options[option]] as const
  })
  const { keepTag } = options
  return { ...given(Object.fromEntries(rules)), ...(keepTag === undefined ? {} : { tags: keepTag }) }
}
