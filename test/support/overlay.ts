import { mkdirSync, rmSync } from 'node:fs'
import { MountError, MS_RDONLY, mount, unmount } from './system.ts'

/** The layers of a mount. `lowers` are top first. Without an upper the mount is read-only. */
export interface Stack {
  readonly lowers: readonly string[]
  readonly upper?: string
  readonly work?: string
}

/** The mount options that the format depends on. */
export interface OverlayOptions {
  readonly namespace: 'trusted' | 'user'
  readonly redirectDir: 'on' | 'off' | 'follow' | 'nofollow'
  readonly metacopy: boolean
  readonly index: boolean
}

export const plainOptions: OverlayOptions = { namespace: 'trusted', redirectDir: 'off', metacopy: false, index: false }

/** Why the kernel refuses a combination of options (EINVAL on 6.18); `undefined` when it takes it. */
export function excludedBecause(options: OverlayOptions): string | undefined {
  if (options.namespace === 'user' && options.redirectDir !== 'nofollow' && options.redirectDir !== 'off') {
    return 'userxattr excludes redirect_dir: a user could point a directory anywhere'
  }
  if (options.namespace === 'user' && options.metacopy) return 'userxattr excludes metacopy'
  if (options.metacopy && options.redirectDir !== 'on') return 'metacopy needs redirect_dir=on'
  return undefined
}

/** Every combination of the matrix, with those that the kernel excludes named by their reason. */
export function optionMatrix(): { options: OverlayOptions; name: string; excluded?: string }[] {
  const cells: { options: OverlayOptions; name: string; excluded?: string }[] = []
  for (const namespace of ['trusted', 'user'] as const) {
    for (const redirectDir of ['off', 'on'] as const) {
      for (const metacopy of [false, true]) {
        for (const index of [false, true]) {
          const options = { namespace, redirectDir, metacopy, index }
          const excluded = excludedBecause(options)
          const name = optionName(options)
          cells.push(excluded === undefined ? { options, name } : { options, name, excluded })
        }
      }
    }
  }
  return cells
}

export function optionName({ namespace, redirectDir, metacopy, index }: OverlayOptions): string {
  return `${namespace} redirect_dir=${redirectDir}${metacopy ? ' metacopy' : ''}${index ? ' index' : ''}`
}

/** The option string for the mount, without the layers. Everything is said, since the defaults differ by distribution. */
function optionString(options: OverlayOptions, hasUpper: boolean): string {
  const parts = [`index=${options.index && hasUpper ? 'on' : 'off'}`, `metacopy=${options.metacopy ? 'on' : 'off'}`]
  if (options.namespace === 'user') parts.push('userxattr')
  // With userxattr the kernel takes no value but nofollow, which it implies: not even off, which means the same.
  const redirectDir = options.namespace === 'user' && options.redirectDir === 'off' ? 'nofollow' : options.redirectDir
  parts.push(`redirect_dir=${redirectDir}`)
  return parts.join(',')
}

/** Mounts a stack. A single lower without an upper gets an empty layer beneath it, since the kernel asks for two. */
export function mountOverlay(stack: Stack, options: OverlayOptions, at: string, readOnly = false): void {
  const lowers = [...stack.lowers]
  if (stack.upper === undefined && lowers.length < 2) {
    const empty = `${at}.empty`
    mkdirSync(empty, { recursive: true })
    lowers.push(empty)
  }
  const layers = [`lowerdir=${lowers.map(escapeLayer).join(':')}`]
  if (stack.upper !== undefined) {
    layers.push(`upperdir=${escapeLayer(stack.upper)}`, `workdir=${escapeLayer(stack.work ?? `${stack.upper}.work`)}`)
    mkdirSync(stack.work ?? `${stack.upper}.work`, { recursive: true })
  }
  const flags = readOnly && stack.upper !== undefined ? MS_RDONLY : 0
  mount('overlay', at, 'overlay', flags, [...layers, optionString(options, stack.upper !== undefined)].join(','))
}

function escapeLayer(path: string): string {
  return path.replace(/[\\:,]/g, '\\$&')
}

let mounts = 0

/** Runs `use` (synchronous) with a stack mounted; it is unmounted afterwards, whatever happens. */
export function withOverlay<T>(
  stack: Stack,
  options: OverlayOptions,
  use: (merged: string) => T,
  { readOnly = false }: { readOnly?: boolean } = {},
): T {
  // Beside the bottom layer, so that the mount point is never inside a layer.
  const at = `${stack.lowers[stack.lowers.length - 1]}.merged${++mounts}`
  mkdirSync(at)
  try {
    mountOverlay(stack, options, at, readOnly)
    try {
      const result = use(at)
      if (result instanceof Promise) throw new Error('the mount would be gone before the promise settles')
      return result
    } finally {
      unmount(at)
    }
  } finally {
    rmSync(at, { recursive: true, force: true })
    rmSync(`${at}.empty`, { recursive: true, force: true })
  }
}

/**
 * Whether the kernel can mount this stack again. It can not (ENODATA) when userxattr and index=on met a hard-linked
 * symlink, fifo, socket or device: their index entries cannot carry `user.*` attributes. Seen on 6.18.
 */
export function isMountable(stack: Stack, options: OverlayOptions): boolean {
  const ENODATA = 61
  try {
    withOverlay(stack, options, () => {})
    return true
  } catch (cause) {
    if (options.namespace === 'user' && options.index && cause instanceof MountError && cause.errno === ENODATA) {
      return false
    }
    throw cause
  }
}
