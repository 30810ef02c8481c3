import type { MissingPeer } from './peers.ts'
import type { Programs } from './program.ts'
import type { Row } from './report.ts'
import type { Scratch } from './scratch.ts'

/** What a row needs to run. */
export type Context<Options> = {
  scratch: Scratch
  programs: Programs
  options: Options
  /** Says what is being done, on stderr. */
  progress: (text: string) => void
  /** Names what this run has to do without. */
  missing: (missing: MissingPeer) => void
}

/** One question of the harness: its rows by id, in the order in which they run. */
export type Rows<Options> = Record<
  string,
  { question: string; rows: (context: Context<Options>) => AsyncGenerator<Row> }
>
