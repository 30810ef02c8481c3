import { freezeCgroup, thawCgroup } from './cgroup.ts'
import { type HookContext, type Hooks, runHook } from './hooks.ts'

/** Brings a container to rest, and back: a stop and a start hook, or the freezer of its cgroup. */
export interface Quiescence {
  begin(signal?: AbortSignal): Promise<void>
  /** Also after a failure, if `begin` was called. */
  end(): Promise<void>
  /** What is frozen meanwhile: whoever recovers from a crash thaws it. */
  readonly cgroup?: string
}

/** Rest by the hooks `stop` and `start`; `health` is waited for, too, where there is one. */
export function quiescenceByHooks(hooks: Hooks, context: HookContext): Quiescence {
  return {
    async begin(signal) {
      await runHook(hooks, 'before', context, signal)
      await runHook(hooks, 'stop', context, signal)
    },
    async end() {
      await runHook(hooks, 'start', context)
      await runHook(hooks, 'health', context)
      await runHook(hooks, 'after', context)
    },
  }
}

/** Rest by freezing a cgroup: for a live solidify, since frozen processes hold the mount. */
export function quiescenceByFreezer(cgroup: string): Quiescence {
  return {
    cgroup,
    begin: async (signal) => {
      await freezeCgroup(cgroup, signal)
    },
    end: async () => thawCgroup(cgroup),
  }
}
