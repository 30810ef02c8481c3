/** What a line and zstd were seen to do, in bytes and milliseconds. */
interface Rates {
  /** Bytes a millisecond that the line takes while it is all that one waits for. */
  line: number | undefined
  /** Bytes a millisecond that zstd reads. */
  zstd: number | undefined
  /** Compressed size by size. */
  ratio: number
}

// One frame in so many is compressed to see whether that would pay, since content and line change.
const TRY_EVERY = 32
// A new figure counts for so much of the mean.
const WEIGHT = 0.3
// Compressing costs the processor of both sides, which other work may want: it has to be clearly faster.
const WORTH = 0.85

/**
 * Decides frame by frame whether to compress: when the line is what one waits for, and zstd makes what goes over it
 * enough smaller. Pure: it is told what was measured.
 */
export class CompressionChoice {
  readonly #rates: Rates = { line: undefined, zstd: undefined, ratio: 1 }
  #frames = 0

  /** Whether the next frame is to be compressed. */
  decide(): boolean {
    const { line, zstd, ratio } = this.#rates
    // As long as the line was never full, compressing would only cost.
    if (line === undefined) return false
    if (zstd === undefined || this.#frames++ % TRY_EVERY === 0) return true
    // Compressing and sending overlap, so the slower of the two sets the pace.
    return Math.max(1 / zstd, ratio / line) < WORTH / line
  }

  /** `bytes` went over the line in the `elapsedMs` in which there was always more to send. */
  sawLine(bytes: number, elapsedMs: number): void {
    if (elapsedMs > 0) this.#rates.line = mean(this.#rates.line, bytes / elapsedMs)
  }

  /** A frame of `bytes` became `compressedBytes`. */
  sawZstd(bytes: number, compressedBytes: number, elapsedMs: number): void {
    if (bytes === 0) return
    this.#rates.zstd = mean(this.#rates.zstd, bytes / Math.max(elapsedMs, 0.01))
    this.#rates.ratio = mean(this.#rates.ratio, compressedBytes / bytes)
  }
}

function mean(before: number | undefined, value: number): number {
  return before === undefined ? value : before + WEIGHT * (value - before)
}
