import { spawnSync } from 'node:child_process'
import { mkdirSync, rmdirSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { mountOverlay, type OverlayOptions, plainOptions, type Stack } from '../support/overlay.ts'
import { isPresent, run, unmount } from '../support/system.ts'
import { diffTrees, readTree } from '../support/tree.ts'
import { downloadPackages, runContainer, unpackDebian } from './container.ts'

const lsync = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))
const tools = ['debootstrap', 'runc', 'dpkg', 'apt-get', 'tar'].every(isPresent)
const isRoot = process.geteuid?.() === 0

/** Installs, removes, moves and edits as a person does in a container. */
const SESSION = `
dpkg -i /packages/*.deb
dpkg --purge --force-depends --force-remove-essential tzdata
dpkg --purge ed
mv /usr/share/doc /usr/share/papers
mkdir /usr/share/doc
rm -r /usr/share/papers/bash
chmod 600 /etc/debian_version
chown 7:8 /etc/issue
echo changed >> /etc/motd
rm -rf /etc/skel && mkdir /etc/skel && echo fresh > /etc/skel/.new
ln /usr/bin/bc /usr/local/bin/calculate
`

// `sh -e` does not end at a command behind `!`.
const PROOF = `
hello --greeting=proof
echo '6*7' | bc
echo '6*7' | calculate
dpkg --status hello | grep ^Status
if dpkg --status ed 2>/dev/null; then exit 1; fi
if test -e /usr/share/zoneinfo/Europe/Berlin; then exit 1; fi
test -z "$(ls -A /usr/share/doc)"
test -d /usr/share/papers/dpkg
if test -e /usr/share/papers/bash; then exit 1; fi
test "$(stat -c %a:%u:%g /etc/debian_version)" = 600:0:0
test "$(stat -c %u:%g /etc/issue)" = 7:8
ls -A /etc/skel
dpkg --verify hello bc dpkg
`

describe.skipIf(!needs('root, debootstrap and runc', tools && isRoot))('a Debian root that people work in', () => {
  const disk = useFileSystem('tmpfs')
  let directory: string
  let packages: string

  beforeAll(() => {
    directory = disk.current.fresh()
    packages = `${directory}/packages`
    unpackDebian(`${directory}/base`)
    downloadPackages(packages, ['hello', 'bc', 'ed', 'libreadline8', 'readline-common'])
  }, 300_000)

  afterAll(() => {
    run('rm', '-rf', directory)
  })

  test.each<[string, OverlayOptions]>([
    ['in place', plainOptions],
    ['in place, with redirects and metacopies', { ...plainOptions, redirectDir: 'on', metacopy: true }],
    ['to a new version, with redirects and metacopies', { ...plainOptions, redirectDir: 'on', metacopy: true }],
  ])(
    'merged %s, it runs again from the merged tree and is what it was',
    async (how, options) => {
      const at = `${directory}/${how.replaceAll(/\W+/g, '-')}`
      mkdirSync(at)
      run('cp', '-a', `${directory}/base`, `${at}/lower`)
      for (const name of ['upper', 'work', 'merged']) mkdirSync(`${at}/${name}`)
      const stack: Stack = { lowers: [`${at}/lower`], upper: `${at}/upper`, work: `${at}/work` }
      mountOverlay(stack, options, `${at}/merged`)
      try {
        runContainer(directory, `${at}/merged`, SESSION, packages)
        // Containers leave mount points for what is mounted into them.
      } finally {
        unmount(`${at}/merged`)
      }
      mountOverlay(stack, options, `${at}/merged`, true)
      const before = readTree(`${at}/merged`)
      unmount(`${at}/merged`)

      const target = how.startsWith('in place') ? ['--in-place'] : ['--output', `${at}/new`]
      const merged = how.startsWith('in place') ? `${at}/lower` : `${at}/new`
      const merging = ['merge', '--upper', `${at}/upper`, '--lower', `${at}/lower`, ...target, '--yes']
      let { status, stderr } = spawnSync(lsync, merging, { encoding: 'utf8' })
      // A mount namespace that something else on this machine made meanwhile has a copy of the mount for as long as it lives.
      for (let tries = 0; tries < 30 && stderr.includes('LAYER_BUSY'); tries++) {
        await delay(1000)
        ;({ status, stderr } = spawnSync(lsync, merging, { encoding: 'utf8' }))
      }
      expect(stderr).not.toContain('lsync:')
      expect(status).toBe(0)

      expect(diffTrees(before, readTree(merged))).toEqual([])
      expect(before.size).toBeGreaterThan(5000)
      const proof = runContainer(directory, merged, PROOF, packages)
      expect(proof.split('\n').slice(0, 5)).toEqual(['proof', '42', '42', 'Status: install ok installed', '.new'])
      rmdirSync(`${at}/merged`)
      run('rm', '-rf', at)
    },
    300_000,
  )
})
