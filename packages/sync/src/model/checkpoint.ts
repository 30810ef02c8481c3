/**
 * A point up to which a target holds everything durably. `root` names the upper's index (made anew with it), so that a
 * target never believes the checkpoint of another; `sequence` only grows.
 */
export interface Checkpoint {
  readonly root: string
  readonly sequence: number
}
