import type { LayerRecord } from './records.ts'

/**
 * The layers to mount for a version's list, top first: of all that there are, the cheapest that stand for the whole of it, and
 * among equally cheap ones the fewest, and of those the ones made last. `undefined` where some of the list is there in no form. Total, O(list × layers).
 */
export function chooseLayers(
  list: readonly string[],
  available: Iterable<LayerRecord>,
  costOf: (layer: LayerRecord) => number = () => 1,
): readonly LayerRecord[] | undefined {
  const byTop = new Map<string, LayerRecord[]>()
  for (const layer of available) {
    const top = layer.covers[0] as string
    const same = byTop.get(top)
    if (same === undefined) byTop.set(top, [layer])
    else same.push(layer)
  }
  // From the bottom up: what the rest of the list from each place on costs at least.
  const best: (Choice | undefined)[] = new Array(list.length + 1).fill(undefined)
  best[list.length] = { cost: 0, count: 0, layer: undefined }
  for (let at = list.length - 1; at >= 0; at--) {
    for (const layer of byTop.get(list[at] as string) ?? []) {
      const end = at + layer.covers.length
      const rest = best[end]
      if (rest === undefined || (layer.isBottom && end !== list.length)) continue
      if (!layer.covers.every((id, i) => list[at + i] === id)) continue
      const choice = { cost: rest.cost + costOf(layer), count: rest.count + 1, layer }
      if (isBetter(choice, best[at])) best[at] = choice
    }
  }
  if (best[0] === undefined) return undefined
  const chosen: LayerRecord[] = []
  for (let at = 0; at < list.length; ) {
    const layer = best[at]?.layer as LayerRecord
    chosen.push(layer)
    at += layer.covers.length
  }
  return chosen
}

interface Choice {
  readonly cost: number
  readonly count: number
  readonly layer: LayerRecord | undefined
}

// Of two layers that stand for the same, somebody wanted the later one. The last comparison only makes the choice the same on every run.
function isBetter(choice: Choice, than: Choice | undefined): boolean {
  if (than === undefined) return true
  if (choice.cost !== than.cost) return choice.cost < than.cost
  if (choice.count !== than.count) return choice.count < than.count
  const [age, thanAge] = [choice.layer?.createdAtMs ?? 0, than.layer?.createdAtMs ?? 0]
  if (age !== thanAge) return age > thanAge
  return (choice.layer?.id ?? '') < (than.layer?.id ?? '')
}
