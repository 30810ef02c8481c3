import type { ByteString } from '@lsync/posix'
import { z } from 'zod'
import type { Home } from './home.ts'
import { readRecord, replaceRecord } from './record-file.ts'
import { RecordId } from './records.ts'

/** One end of a switch. `lease` is how the node calls itself when it claims one. */
const SwitchEnd = z.strictObject({ nodeId: RecordId, name: z.string().max(1000), lease: z.string().min(1).max(255) })
export type SwitchEnd = z.infer<typeof SwitchEnd>

/**
 * How far a switch has come, in the order of its phases; `undone`: the container is back where it was. Until `passed` the source
 * says so, from `mounted` on the target: whoever has the lease.
 */
export const SwitchPhase = z.enum(['stopping', 'published', 'passed', 'mounted', 'committed', 'undone'])
export type SwitchPhase = z.infer<typeof SwitchPhase>

/** `switch.json` of a home: the last switch. Replaced as a whole, by the node that has the lease. */
export const SwitchRecord = z.strictObject({
  format: z.literal(1),
  id: RecordId,
  from: SwitchEnd,
  to: SwitchEnd,
  phase: SwitchPhase,
  /** The lease under which this was written. */
  epoch: z.int().positive(),
  updatedAtMs: z.int().nonnegative(),
})
export type SwitchRecord = z.infer<typeof SwitchRecord>

/** A switch as all of its phases name it. */
export const SwitchPlan = SwitchRecord.omit({ phase: true, epoch: true, updatedAtMs: true })
export type SwitchPlan = z.infer<typeof SwitchPlan>

const SWITCH_JSON = 'switch.json' as ByteString

/** The last switch of a root; `undefined` before the first. */
export function readSwitch({ place }: Home): SwitchRecord | undefined {
  return readRecord(place, SWITCH_JSON, SwitchRecord)
}

/** Says how far a switch has come. The caller has checked its lease. */
export function writeSwitch({ place }: Home, record: SwitchRecord): void {
  replaceRecord(place, SWITCH_JSON, SwitchRecord.parse(record))
}
