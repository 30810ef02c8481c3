import { execFileSync } from 'node:child_process'
import { mkdtempSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { onTestFinished } from 'vitest'
import { close, hostPath, openRoot } from '../../packages/posix/src/index.ts'

/** A new directory and an fd of it, both gone when the test ends. */
export function temporary(base = tmpdir()): { path: string; fd: number } {
  const path = mkdtempSync(`${base}/lsync-posix-`)
  const fd = openRoot(hostPath(path))
  onTestFinished(() => {
    close(fd)
    // Not rmSync, which fails on trees deeper than PATH_MAX.
    execFileSync('rm', ['-rf', path])
  })
  return { path, fd }
}
