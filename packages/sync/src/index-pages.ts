import { eachRow, pageOf, rowAt, rowBytes } from './model/row.ts'

/** A page that is longer is divided. */
export const PAGE_BYTES = 24 * 1024
/** A directory has at most 2^16 pages. */
export const MAX_BITS = 16

/** Rows in as many pages as `bits` says, or as their length asks for. */
export function pageRows(pages: readonly Buffer[], bits?: number): Buffer[] {
  const total = pages.reduce((sum, page) => sum + page.length, 0)
  let chosen = bits ?? 0
  if (bits === undefined) while (total >> chosen > PAGE_BYTES / 2 && chosen < MAX_BITS) chosen++
  if (chosen === 0) return [pages.length === 1 ? (pages[0] as Buffer) : Buffer.concat(pages)]
  const parts: Buffer[][] = Array.from({ length: 1 << chosen }, () => [])
  for (const page of pages) {
    eachRow(page, (name, at) => (parts[pageOf(name, chosen)] as Buffer[]).push(rowBytes(rowAt(page, at))))
  }
  return parts.map((rows) => Buffer.concat(rows))
}
