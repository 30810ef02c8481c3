import { existsSync, mkdirSync, statSync, utimesSync, writeFileSync } from 'node:fs'
import { afterEach, describe, expect, test } from 'vitest'
import {
  buildTree,
  character,
  type DirectorySpec,
  dir,
  fifo,
  file,
  linkTo,
  metacopy,
  opaque,
  redirected,
  removeTree,
  socket,
  sparse,
  symlink,
  whiteout,
  xattrWhiteout,
} from '../support/build.ts'
import { engine } from '../support/engine.ts'
import { useFileSystem } from '../support/image.ts'
import { expectNone } from '../support/matrix.ts'
import { describeLayers, mergeEveryWay, type Subject, viewOf } from '../support/merging.ts'
import { aclOf, applyOperations, capabilityOf, type Operation } from '../support/operations.ts'
import { mountOverlay, type OverlayOptions, plainOptions, withOverlay } from '../support/overlay.ts'
import { canMountImages } from '../support/ready.ts'
import { mount, run, unmount } from '../support/system.ts'
import { outline, readTree, type Tree } from '../support/tree.ts'

// Each case was found on a real kernel (overlay-format.md, R1 to R35) and has broken a tool or a naive way to merge.
// The literal outline is for the reader; the judge is the kernel's view, in every mode.

const withRedirects: OverlayOptions = { ...plainOptions, redirectDir: 'on', metacopy: true }
const withIndex: OverlayOptions = { ...plainOptions, index: true }
const user: OverlayOptions = { ...plainOptions, namespace: 'user' }

describe.skipIf(!canMountImages())('named cases', () => {
  const disk = useFileSystem('ext4')
  const used: string[] = []
  afterEach(() => {
    for (const directory of used.splice(0)) removeTree(directory)
  })
  const fresh = () => {
    const directory = disk.current.fresh()
    used.push(directory)
    return directory
  }

  /** Merges hand-made layers, top first, in every mode; the view must be `shown`. */
  async function expectMerged(
    specs: readonly DirectorySpec[],
    shown: Record<string, string>,
    { options = withRedirects, ...rest }: Partial<Subject> = {},
  ): Promise<Tree> {
    const directory = fresh()
    const layers = specs.map((spec, index) => {
      const path = `${directory}/${index === 0 ? 'u' : `l${index}`}`
      buildTree(path, spec, { namespace: options.namespace, epoch: 1_600_000_000 - index * 100_000 })
      return path
    })
    const subject = { directory, layers, options, clones: ['copy', 'hardlink'] as const, ...rest }
    const view = viewOf(subject)
    expect(outline(view)).toEqual(shown)
    await expectNone(mergeEveryWay(subject), describeLayers(layers))
    return view
  }

  /** Merges what `change` did through a real mount of `specs` (lowers, top first). */
  async function expectChanged(
    specs: readonly DirectorySpec[],
    change: (merged: string) => void,
    shown: Record<string, string>,
    { options = withRedirects, ...rest }: Partial<Subject> = {},
  ): Promise<Tree> {
    const directory = fresh()
    const lowers = specs.map((spec, index) => {
      const path = `${directory}/l${index + 1}`
      buildTree(path, spec, { namespace: options.namespace, epoch: 1_600_000_000 - index * 100_000 })
      return path
    })
    const [upper, work] = [`${directory}/u`, `${directory}/w`]
    mkdirSync(upper)
    withOverlay({ lowers, upper, work }, options, change)
    const layers = [upper, ...lowers]
    const subject = { directory, layers, work, options, clones: ['copy', 'hardlink'] as const, ...rest }
    const view = viewOf(subject)
    expect(outline(view)).toEqual(shown)
    await expectNone(mergeEveryWay(subject), describeLayers(layers))
    return view
  }

  const shell = (command: string) => (merged: string) => {
    run('bash', '-ec', `cd ${merged}; ${command}`)
  }

  test('R1: a directory over a lower whiteout does not bring back what the whiteout hid', () =>
    expectMerged(
      [dir({ d: dir({ new: file('new') }) }), dir({ d: whiteout() }), dir({ d: dir({ old: file('old') }) })],
      {
        d: 'dir',
        'd/new': 'new',
      },
    ))

  test('R2: a whiteout that readdir lists and lookup denies is no entry', () =>
    expectMerged([dir({ p: dir({ wo: whiteout(), f: file('f') }) }), dir()], { p: 'dir', 'p/f': 'f' }))

  test('R3: an xattr whiteout counts, with or without opaque=x on its directory, in every layer', () =>
    expectMerged(
      [
        dir({ d: dir({ f: xattrWhiteout() }, { marks: { opaque: 'x' } }), e: dir({ f: xattrWhiteout() }) }),
        dir({ d: dir({ f: file('1'), g: xattrWhiteout() }), e: dir({ f: file('2') }) }),
        dir({ d: dir({ g: file('3'), h: file('h') }) }),
      ],
      { d: 'dir', 'd/h': 'h', e: 'dir' },
    ))

  test('R3: a file that is not empty is no whiteout, whatever it carries', () =>
    expectMerged([dir({ f: file('data', { marks: { whiteout: 'y' } }) }), dir({ f: file('old') })], { f: 'data' }))

  test('R4: a swap of two directories leaves both trees whole', () =>
    expectMerged(
      [
        dir({ a: redirected('b'), b: redirected('a') }),
        dir({ a: dir({ fa: file('fa') }), b: dir({ fb: file('fb') }) }),
      ],
      { a: 'dir', 'a/fb': 'fb', b: 'dir', 'b/fa': 'fa' },
    ))

  test('R4: a ring of three, through real renames', () =>
    expectChanged(
      [dir({ a: dir({ fa: file('fa') }), b: dir({ fb: file('fb') }), c: dir({ fc: file('fc') }) })],
      shell('mv -T a t; mv -T b a; mv -T c b; mv -T t c'),
      { a: 'dir', 'a/fb': 'fb', b: 'dir', 'b/fc': 'fc', c: 'dir', 'c/fa': 'fa' },
    ))

  test('R5: renames in two layers are composed', () =>
    expectMerged(
      [
        dir({ c: redirected('b'), b: whiteout() }),
        dir({ b: redirected('a'), a: whiteout() }),
        dir({ a: dir({ f: file('f') }), b: dir({ not: file('not') }) }),
      ],
      { c: 'dir', 'c/f': 'f' },
    ))

  test('R6: a relative redirect beneath an opaque directory finds nothing, an absolute one does', () =>
    expectMerged(
      [
        dir({ op: opaque({ in: redirected('x'), out: redirected('/x') }) }),
        dir({ x: dir({ fx: file('fx') }), op: dir({ x: dir({ no: file('no') }) }) }),
      ],
      { op: 'dir', 'op/in': 'dir', 'op/out': 'dir', 'op/out/fx': 'fx', x: 'dir', 'x/fx': 'fx' },
      { diff: { links: false } },
    ))

  test('a directory moved out of a renamed directory, which is then deleted', () =>
    expectChanged([dir({ p: dir({ c: dir({ f: file('f') }), d: file('d') }) })], shell('mv p q; mv q/c out; rm -r q'), {
      out: 'dir',
      'out/f': 'f',
    }))

  test('a directory moved and made again under its old name', () =>
    expectChanged([dir({ a: dir({ f: file('old') }) })], shell('mv a b; mkdir a; echo -n new >a/g'), {
      a: 'dir',
      'a/g': 'new',
      b: 'dir',
      'b/f': 'old',
    }))

  test('a directory moved into what was its child', () =>
    expectChanged([dir({ a: dir({ b: dir({ c: file('c') }), f: file('f') }) })], shell('mv a/b x; mv a x/a; mv x a'), {
      a: 'dir',
      'a/c': 'c',
      'a/a': 'dir',
      'a/a/f': 'f',
    }))

  test('R8: data of a metacopy comes from below, with the metadata of the metacopy', () =>
    expectMerged(
      [
        dir({ f: metacopy(5, { mode: 0o600, uid: 8 }), moved: metacopy(5, { redirect: '/d/g' }) }),
        dir({ f: file('below'), d: dir({ g: file('other') }) }),
      ],
      { f: 'below', moved: 'other', d: 'dir', 'd/g': 'other' },
      { diff: { links: false } },
    ))

  test('R8: hard-linked metacopies stay linked, through real operations and two layers', async () => {
    const view = await expectChanged(
      [dir({}), dir({ f: file('data') })],
      shell('chmod 600 f; ln f g; mkdir d; ln f d/h; mv f z'),
      { z: 'data', g: 'data', d: 'dir', 'd/h': 'data' },
    )
    expect(view.get('z')?.links).toEqual(['d/h', 'g', 'z'])
  })

  test('R9, marks of the kernel on copied-up objects are not part of the result', () =>
    expectChanged([dir({ d: dir({ f: file('1') }) })], shell('chmod 700 d; chmod 600 d/f; ls -R >/dev/null'), {
      d: 'dir',
      'd/f': '1',
    }))

  test.each([
    ['trusted', withRedirects],
    ['user', user],
  ] as const)('R11: attributes of a nested overlay keep their meaning, %s', async (namespace, options) => {
    const view = await expectChanged(
      [dir({ d: dir({ low: file('low') }) })],
      shell(
        `mkdir n; setfattr -n ${namespace}.overlay.opaque -v y n; setfattr -n ${namespace}.overlay.opaque -v y d; touch w; setfattr -n ${namespace}.overlay.whiteout w; setfattr -n ${namespace}.overlay.overlay.x -v z n`,
      ),
      { d: 'dir', 'd/low': 'low', n: 'dir', w: '' },
      { options },
    )
    expect([...(view.get('n')?.xattrs.keys() ?? [])]).toEqual([
      `${namespace}.overlay.opaque`,
      `${namespace}.overlay.overlay.x`,
    ])
  })

  test('marks of the other namespace are ordinary attributes', () =>
    expectMerged(
      [
        dir({
          d: dir({}, { xattrs: { 'user.overlay.opaque': 'y' } }),
          w: file('', { xattrs: { 'user.overlay.whiteout': 'y' } }),
        }),
        dir({ d: dir({ f: file('f') }), w: file('w') }),
      ],
      { d: 'dir', 'd/f': 'f', w: '' },
    ))

  test('R12: flags that the view emulates become real ones, of files and directories', async () => {
    const view = await expectChanged(
      [dir({ f: file('f'), d: dir({ g: file('g') }) })],
      shell('chattr +i f; chattr +a d'),
      {
        f: 'f',
        d: 'dir',
        'd/g': 'g',
      },
    )
    expect(view.get('f')?.flags).toBe('i')
    expect(view.get('d')?.flags).toBe('a')
  })

  test('R12: real flags of a lower file stay, and do not stand in the way', () =>
    expectChanged(
      [dir({ f: file('f', { flags: 'i' }), g: file('g', { flags: 'ia' }), d: dir({ h: file('h') }, { flags: 'i' }) })],
      shell('chattr -ia g; rm g; chattr -i d; rm d/h'),
      {
        f: 'f',
        d: 'dir',
      },
    ))

  test('R12: emulated flags count in the upper alone, as in the mount', () =>
    expectMerged(
      [
        dir(),
        dir({ f: file('f', { marks: { protattr: 'i' } }), d: dir({}, { marks: { protattr: 'a' } }) }),
        dir({ d: dir({ g: file('g') }) }),
      ],
      { f: 'f', d: 'dir', 'd/g': 'g' },
    ))

  test('R13: with an index, a change through one name shows through all', async () => {
    const view = await expectChanged(
      [dir({ a: file('old'), b: linkTo('a'), d: dir({ c: linkTo('a') }) })],
      (merged) => writeFileSync(`${merged}/a`, 'new'),
      { a: 'new', b: 'new', d: 'dir', 'd/c': 'new' },
      { options: withIndex },
    )
    expect(view.get('a')?.links).toEqual(['a', 'b', 'd/c'])
  })

  test('R13: with an index, a name of a changed inode is removed and another added', async () => {
    const view = await expectChanged(
      [dir({ a: file('old'), b: linkTo('a'), c: linkTo('a') })],
      shell('echo -n new >a; rm b; ln c e; mv a z'),
      { c: 'new', e: 'new', z: 'new' },
      { options: { ...withRedirects, metacopy: false, index: true } },
    )
    expect(view.get('c')?.links).toEqual(['c', 'e', 'z'])
  })

  test('R13: with an index and all changed names removed, the others still show the change', () =>
    expectChanged(
      [dir({ a: file('old'), b: linkTo('a') })],
      shell('echo -n new >a; rm a'),
      { b: 'new' },
      { options: withIndex },
    ))

  test('R13: without the index, the other names keep the old content and stay linked', async () => {
    const view = await expectChanged(
      [dir({ a: file('old'), b: linkTo('a'), c: linkTo('a') })],
      (merged) => writeFileSync(`${merged}/a`, 'new'),
      { a: 'new', b: 'old', c: 'old' },
      { options: plainOptions },
    )
    expect(view.get('b')?.links).toEqual(['b', 'c'])
  })

  test('R12: an upper that an earlier merge made has real flags, which do not stand in the way', () =>
    expectMerged(
      [
        dir({
          f: file('new', { flags: 'i' }),
          g: linkTo('f'),
          d: dir({ e: file('e') }, { flags: 'a' }),
          p: file('p', { flags: 'a' }),
        }),
        dir({ f: file('old'), d: dir({ h: file('h') }) }),
      ],
      { f: 'new', g: 'new', d: 'dir', 'd/e': 'e', 'd/h': 'h', p: 'p' },
    ))

  test('R12: flags go along with a directory that a redirect moves, and stay behind where they do not show', async () => {
    const view = await expectChanged(
      [
        dir({
          d: dir({ sub: dir({ f: file('f', { flags: 'a' }) }, { flags: 'i' }), g: file('g', { flags: 'i' }) }),
          e: dir({ deep: dir({ er: dir({ h: file('h') }, { flags: 'a' }) }) }),
        }),
      ],
      shell('mv d r; mkdir d; mkdir d/sub; mv e/deep t; chattr +a t; chattr +i r'),
      {
        d: 'dir',
        'd/sub': 'dir',
        e: 'dir',
        r: 'dir',
        'r/g': 'g',
        'r/sub': 'dir',
        'r/sub/f': 'f',
        t: 'dir',
        't/er': 'dir',
        't/er/h': 'h',
      },
    )
    const flagged = [...view].filter(([, { flags }]) => flags !== '').map(([path, { flags }]) => `${path} ${flags}`)
    expect(flagged).toEqual(['r i', 'r/g i', 'r/sub i', 'r/sub/f a', 't a', 't/er a'])
  })

  test('R12: changes below an immutable lower directory, and one that shows twice', async () => {
    const view = await expectMerged(
      [
        dir({ d: dir({ s: dir({ new: file('new') }) }), x: redirected('m'), y: redirected('m') }),
        dir({
          d: dir({ s: dir({ old: file('old') }, { flags: 'i' }), t: file('t') }, { flags: 'i' }),
          m: dir({ k: dir({ f: file('f', { flags: 'a' }) }, { flags: 'i' }) }),
        }),
      ],
      {
        d: 'dir',
        'd/s': 'dir',
        'd/s/new': 'new',
        'd/s/old': 'old',
        'd/t': 't',
        m: 'dir',
        'm/k': 'dir',
        'm/k/f': 'f',
        x: 'dir',
        'x/k': 'dir',
        'x/k/f': 'f',
        y: 'dir',
        'y/k': 'dir',
        'y/k/f': 'f',
      },
      { diff: { links: false } },
    )
    expect(view.get('x/k')?.flags).toBe('i')
    expect(view.get('d')?.flags).toBe('')
  })

  test('R12: real flags of an upper stay on what loses marks by the merge', () =>
    expectMerged(
      [
        dir({
          o: opaque(
            { in: opaque({ f: file('f', { marks: { origin: '' }, flags: 'a' }) }, { flags: 'i' }) },
            { flags: 'i' },
          ),
          g: file('g', { marks: { origin: '' }, flags: 'i' }),
        }),
        dir({ o: dir({ gone: file('gone') }), g: file('old') }),
      ],
      { g: 'g', o: 'dir', 'o/in': 'dir', 'o/in/f': 'f' },
    ))

  test.each(['i', 'a'] as const)(
    'R12: the root is immutable or append-only (+%s) where the upper root is',
    async (flags) => {
      const view = await expectMerged(
        [dir({ e: redirected('d'), d: whiteout() }, { flags }), dir({ f: file('f'), d: dir({ g: file('g') }) })],
        { e: 'dir', 'e/g': 'g', f: 'f' },
      )
      expect(view.get('')?.flags).toBe(flags)
    },
  )

  test('R12: the kernel forgets the emulated flags of a root, and a lower root has no say', async () => {
    const view = await expectChanged(
      [dir({ f: file('f') }, { flags: 'a' }), dir({ h: file('h') }, { flags: 'i' })],
      shell('mv f g; chattr +i .'),
      { g: 'f', h: 'h' },
    )
    expect(view.get('')?.flags).toBe('')
  })

  // What the random histories found in the engine, as small as it gets.

  test('a metacopy that is linked to a second name keeps its data under both', () =>
    expectChanged([dir(), dir({ c: dir({ f: file('two') }) })], shell('mkdir a; ln c/f a/g'), {
      a: 'dir',
      'a/g': 'two',
      c: 'dir',
      'c/f': 'two',
    }))

  test('a flag of a lower inode stays on the names that stay, when another name of it goes', async () => {
    const view = await expectChanged(
      [dir({ d: dir({ x: file('x', { flags: 'a' }) }), b: dir({ y: linkTo('d/x') }), z: linkTo('d/x') })],
      shell('chattr -a d/x; rm -r d; mkdir d; mv b e'),
      { d: 'dir', e: 'dir', 'e/y': 'x', z: 'x' },
    )
    expect(view.get('e/y')?.flags).toBe('a')
  })

  test('a new directory that is made immutable holds a directory that was moved into it', async () => {
    const view = await expectChanged(
      [dir({ a: dir({ a: dir({ f: file('f') }) }), c: dir() })],
      shell('mkdir c/b; mv a/a c/b/a; chattr +i c/b'),
      { a: 'dir', c: 'dir', 'c/b': 'dir', 'c/b/a': 'dir', 'c/b/a/f': 'f' },
    )
    expect(view.get('c/b')?.flags).toBe('i')
  })

  test('an opaque directory, a file or a whiteout takes the place of an immutable lower directory', () =>
    expectMerged(
      [
        dir({ b: opaque(), f: file('f'), w: whiteout(), s: redirected('t'), t: whiteout() }),
        dir({
          b: dir({ a: dir() }, { flags: 'i' }),
          f: dir({ a: dir() }, { flags: 'i' }),
          w: dir({ a: dir({ x: file('x', { flags: 'ia' }) }) }, { flags: 'a' }),
          s: dir({ a: dir() }, { flags: 'i' }),
          t: dir({ y: file('y') }, { flags: 'i' }),
        }),
      ],
      { b: 'dir', f: 'f', s: 'dir', 's/y': 'y' },
    ))

  test.each(['i', 'a'] as const)(
    'a directory takes the place of a lower file that is immutable or append-only (+%s)',
    async (flags) => {
      await expectMerged([dir({ h: opaque({ x: file('x') }) }), dir({ h: file('h', { flags }) })], {
        h: 'dir',
        'h/x': 'x',
      })
    },
  )

  test('with an index, the other name of a changed inode may lie in any lower', () =>
    expectChanged(
      [dir(), dir({ g: file('old'), h: linkTo('g'), d: dir({ i: linkTo('g') }) })],
      shell('echo -n new >g; chmod 700 g; setfattr -n user.x -v 1 g'),
      { g: 'new', h: 'new', d: 'dir', 'd/i': 'new' },
      { options: withIndex },
    ))

  test('with an index, a linked file that is moved away leaves its other name linked to it', () =>
    expectChanged(
      [dir({ b: dir({ i: file('f') }), c: dir({ h: linkTo('b/i') }) }), dir({ c: dir({ h: file('f') }) })],
      shell('mv c/h z'),
      { b: 'dir', 'b/i': 'f', c: 'dir', z: 'f' },
      { options: withIndex },
    ))

  test('with an index, metadata changed through one name shows through the other in a middle layer', () =>
    expectChanged(
      [
        dir({ b: opaque({ x: file('two') }), c: dir({ h: linkTo('b/x') }) }),
        dir(),
        dir({ c: dir({ h: file('two') }) }),
      ],
      shell('setfacl -m u:9:rwx b/x; setcap cap_net_raw+ep b/x'),
      { b: 'dir', 'b/x': 'two', c: 'dir', 'c/h': 'two' },
      { options: withIndex },
    ))

  test('with an index, a linked metacopy moved over the directory that held its other name', () =>
    expectChanged(
      [
        dir({
          a: dir({ e: opaque({ h: metacopy(2, { redirect: '/c/b/a' }) }) }),
          c: dir({ b: dir({ a: linkTo('a/e/h') }) }),
        }),
        dir({ a: dir({ a: dir({ g: file('g') }) }), c: dir({ b: dir({ a: file('ab') }) }), e: file('e') }),
      ],
      (merged) =>
        applyOperations(merged, [
          { do: 'write', path: 'c/c/a', content: 'new' },
          { do: 'exchange', path: 'c/c/a', to: 'a' },
          { do: 'exchange', path: 'a', to: 'c/b/a' },
        ]),
      {
        a: 'ab',
        c: 'dir',
        'c/b': 'dir',
        'c/b/a': 'new',
        'c/c': 'dir',
        'c/c/a': 'dir',
        'c/c/a/a': 'dir',
        'c/c/a/a/g': 'g',
        'c/c/a/e': 'dir',
        'c/c/a/e/h': 'ab',
        e: 'e',
      },
      { options: { ...withRedirects, index: true } },
    ))

  test('R14: an in-place change of one alias leaves the other as it was, metadata too', () =>
    expectChanged(
      [dir({ a: file('old', { mode: 0o640 }), b: linkTo('a'), m: file('m'), n: linkTo('m') })],
      shell('echo -n new >a; chmod 600 m; chown 5 m; setfattr -n user.x -v 1 m'),
      { a: 'new', b: 'old', m: 'm', n: 'm' },
    ))

  test('R15: setuid, setgid and capabilities survive owners', async () => {
    const view = await expectMerged(
      [
        dir({
          suid: file('1', { mode: 0o6755, uid: 5, gid: 6 }),
          caps: file('2', {
            uid: 5,
            gid: 5,
            xattrs: { 'security.capability': capabilityOf(0x400).toString('latin1') },
          }),
          sgid: file('3', { mode: 0o2644, gid: 7 }),
          d: dir({ f: file('4', { gid: 0 }) }, { mode: 0o2777, gid: 9 }),
        }),
        dir({ suid: file('old'), d: dir({ g: file('5') }, { mode: 0o700 }) }),
      ],
      { suid: '1', caps: '2', sgid: '3', d: 'dir', 'd/f': '4', 'd/g': '5' },
    )
    expect(view.get('suid')?.mode).toBe(0o6755)
    expect(view.get('caps')?.xattrs.has('security.capability')).toBe(true)
  })

  test('R16: a default ACL or setgid of the parent is not inherited by what is put into it', () => {
    const acl = aclOf(9, 7).toString('latin1')
    return expectMerged(
      [
        dir({
          d: dir(
            {
              new: file('new', { mode: 0o600 }),
              sub: dir({ deep: file('1') }, { mode: 0o700 }),
              l: symlink('x'),
              p: fifo(),
            },
            { mode: 0o2755, gid: 3, xattrs: { 'system.posix_acl_default': acl } },
          ),
        }),
        dir(
          { d: dir({ old: file('old') }, { xattrs: { 'system.posix_acl_default': acl } }) },
          { xattrs: { 'system.posix_acl_default': acl } },
        ),
      ],
      { d: 'dir', 'd/new': 'new', 'd/sub': 'dir', 'd/sub/deep': '1', 'd/l': '-> x', 'd/p': 'fifo', 'd/old': 'old' },
    )
  })

  test('R17: attributes and ACLs of a lower directory vanish with an upper that has none, at the root too', async () => {
    const low = {
      xattrs: {
        'user.low': '1',
        'trusted.low': '2',
        'system.posix_acl_access': aclOf(9, 5).toString('latin1'),
        'system.posix_acl_default': aclOf(9, 5).toString('latin1'),
      },
    }
    const view = await expectMerged(
      [
        dir({ d: dir({}, { mode: 0o700, uid: 4 }) }, { mode: 0o711, gid: 3 }),
        dir({ d: dir({ f: file('f') }, low) }, low),
      ],
      { d: 'dir', 'd/f': 'f' },
    )
    expect(view.get('')?.mode).toBe(0o711)
    expect(view.get('d')?.xattrs.size).toBe(0)
  })

  test('R18: what is mounted inside a layer is not part of it', async () => {
    const directory = fresh()
    buildTree(`${directory}/u`, dir({ f: file('f') }))
    buildTree(`${directory}/l1`, dir({ mp: dir({ under: file('under') }) }))
    mount('tmpfs', `${directory}/l1/mp`, 'tmpfs', 0, 'size=1m')
    try {
      writeFileSync(`${directory}/l1/mp/on`, 'on')
      const layers = [`${directory}/u`, `${directory}/l1`]
      const view = viewOf({ directory, layers, options: plainOptions })
      expect(outline(view)).toEqual({ f: 'f', mp: 'dir', 'mp/under': 'under' })
      await engine
        .merge({
          upper: `${directory}/u`,
          lowers: [`${directory}/l1`],
          mode: 'output',
          output: `${directory}/new`,
          namespace: 'trusted',
          workers: 0,
        })
        .then(
          () => expect(outline(readTree(`${directory}/new`))).toEqual(outline(view)),
          // To refuse is as good; to copy what is mounted is not.
          (cause) => expect(cause).toMatchObject({ code: expect.stringMatching(/^[A-Z_]+$/) }),
        )
    } finally {
      unmount(`${directory}/l1/mp`)
    }
  })

  test.each(['upper', 'lower'] as const)('R19: a layer of a live mount is refused, as its %s', async (role) => {
    const directory = fresh()
    for (const name of ['u', 'l', 'x']) buildTree(`${directory}/${name}`, dir({ f: file(name) }))
    mkdirSync(`${directory}/m`)
    const stack =
      role === 'upper'
        ? { lowers: [`${directory}/x`], upper: `${directory}/u` }
        : { lowers: [`${directory}/l`, `${directory}/x`] }
    mountOverlay(stack, plainOptions, `${directory}/m`)
    try {
      const before = readTree(`${directory}/u`)
      const request = {
        upper: `${directory}/u`,
        lowers: [`${directory}/l`],
        mode: 'in-place',
        namespace: 'trusted',
        workers: 0,
      } as const
      await expect(engine.merge(request)).rejects.toMatchObject({ code: 'LAYER_BUSY' })
      expect([...readTree(`${directory}/u`).keys()]).toEqual([...before.keys()])
    } finally {
      unmount(`${directory}/m`)
    }
  })

  test('R22: a change that keeps size and mtime is a change', () =>
    expectChanged(
      [dir({ f: file('old', { mtimeNs: 9_000_000_000n }) })],
      (merged) => {
        writeFileSync(`${merged}/f`, 'new')
        utimesSync(`${merged}/f`, 9, 9)
      },
      { f: 'new' },
    ))

  test('R23: every change of type, both ways', () =>
    expectChanged(
      [
        dir({
          d: dir({ g: file('g') }),
          e: dir({ x: file('x') }),
          o: dir({ x: file('x') }),
          f: file('f'),
          s: symlink('d'),
          p: fifo(),
          k: socket(),
          c: character(1, 3),
        }),
      ],
      shell(
        'rm d/g; rm -r e; ln -s d e; rm -r o; mkdir o; rm f; mkdir f; touch f/n; rm s; mkdir s; rm p; echo -n 1 >p; rm k; ln -s p k; rm c; mkfifo c',
      ),
      { c: 'fifo', d: 'dir', e: '-> d', f: 'dir', 'f/n': '', k: '-> p', o: 'dir', p: '1', s: 'dir' },
    ))

  test('R24: a lower symlink in the way of an upper directory is replaced, not followed', async () => {
    const outside = fresh()
    buildTree(`${outside}/out`, dir({ s: file('safe') }))
    await expectMerged(
      [
        dir({ a: dir({ s: file('pwn') }), b: dir({ deep: dir({ s: file('pwn') }) }) }),
        dir({ a: symlink(`${outside}/out`), b: dir({ deep: symlink(`${outside}/out`) }) }),
      ],
      {
        a: 'dir',
        'a/s': 'pwn',
        b: 'dir',
        'b/deep': 'dir',
        'b/deep/s': 'pwn',
      },
    )
    expect(outline(readTree(`${outside}/out`))).toEqual({ s: 'safe' })
  })

  test('R25: names are bytes: newline, not UTF-8, backslash, 255 bytes, deleted and kept', () => {
    const names = ['\xff\xfe', 'a\nb', 'c\\d', 'n'.repeat(255), '\xc3\xa9', '-rf', ' ', 'm'.repeat(252)]
    const all = (make: (name: string) => ReturnType<typeof file>) =>
      Object.fromEntries(names.map((name) => [name, make(name)]))
    return expectMerged(
      [
        dir({
          gone: dir(all(() => whiteout())),
          changed: dir(all(() => file('new'))),
          moved: redirected(`from${'\xfe'}`),
          [`from${'\xfe'}`]: whiteout(),
        }),
        dir({
          gone: dir(all(() => file('x'))),
          changed: dir(all(() => file('old'))),
          kept: dir(all(() => file('k'))),
          [`from${'\xfe'}`]: dir(all(() => file('m'))),
        }),
      ],
      {
        gone: 'dir',
        changed: 'dir',
        kept: 'dir',
        moved: 'dir',
        ...Object.fromEntries(
          ['\\xff\\xfe', 'a\\nb', 'c\\\\d', 'n'.repeat(255), 'é', '-rf', ' ', 'm'.repeat(252)].flatMap((name) => [
            [`changed/${name}`, 'new'],
            [`kept/${name}`, 'k'],
            [`moved/${name}`, 'm'],
          ]),
        ),
      },
    )
  })

  test('R26: a tree deeper than PATH_MAX', async () => {
    let [lower, upper]: [DirectorySpec, DirectorySpec] = [
      dir({ leaf: file('leaf'), gone: file('x') }),
      dir({ leaf: file('new'), gone: whiteout() }),
    ]
    const shown: Record<string, string> = {}
    for (let depth = 0; depth < 30; depth++) {
      lower = dir({ ['n'.repeat(200)]: lower })
      upper = dir({ ['n'.repeat(200)]: upper })
    }
    let path = ''
    for (let depth = 0; depth < 30; depth++) {
      path += `${depth === 0 ? '' : '/'}${'n'.repeat(200)}`
      shown[path] = 'dir'
    }
    shown[`${path}/leaf`] = 'new'
    await expectMerged([upper, lower], shown)
  })

  test('R27: only the one byte y closes a directory, and never the layer root', () =>
    expectMerged(
      [
        dir(
          { d: dir({}, { marks: { opaque: 'Y' } }), e: dir({}, { marks: { opaque: 'y\0' } }), f: opaque() },
          { marks: { opaque: 'y' } },
        ),
        dir({ d: dir({ low: file('1') }), e: dir({ low: file('2') }), f: dir({ low: file('3') }) }),
      ],
      { d: 'dir', 'd/low': '1', e: 'dir', 'e/low': '2', f: 'dir' },
    ))

  test('R28: a redirect on a full file is dead', () =>
    expectMerged([dir({ f: file('own', { marks: { redirect: '/g' } }) }), dir({ f: file('old'), g: file('other') })], {
      f: 'own',
      g: 'other',
    }))

  test('R29: times of directories are those of the view, whatever is put in or moved out', async () => {
    const view = await expectMerged(
      [
        dir(
          {
            into: dir({ n1: file('1'), n2: dir({ n3: file('3') }) }, { mtimeNs: 11n }),
            from: dir({}, { mtimeNs: 22n }),
            out: redirected('/from/child', { more: file('m') }, { mtimeNs: 33n }),
            from2: dir({ gone: whiteout() }, { mtimeNs: 44n }),
          },
          { mtimeNs: 55n },
        ),
        dir({
          into: dir({ old: file('o') }),
          from: dir({ child: dir({ c: file('c') }) }),
          from2: dir({ gone: file('g'), deep: dir({ untouched: file('u') }, { mtimeNs: 66n }) }),
        }),
      ],
      {
        into: 'dir',
        'into/n1': '1',
        'into/n2': 'dir',
        'into/n2/n3': '3',
        'into/old': 'o',
        from: 'dir',
        'from/child': 'dir',
        'from/child/c': 'c',
        from2: 'dir',
        'from2/deep': 'dir',
        'from2/deep/untouched': 'u',
        out: 'dir',
        'out/c': 'c',
        'out/more': 'm',
      },
      { diff: { links: false } },
    )
    expect([view.get('')?.mtimeNs, view.get('into')?.mtimeNs, view.get('out')?.mtimeNs]).toEqual([55n, 11n, 33n])
  })

  test('R29: moving children out of a lower directory by real renames keeps every other time', () =>
    expectChanged(
      [
        dir({
          a: dir({ x: dir({ f: file('f') }), y: dir({ g: file('g') }) }),
          b: dir({ z: file('z') }, { mtimeNs: 5n }),
        }),
      ],
      shell(
        'mv a/x x; mv a/y b/y; touch -d @7.000000007 a; touch -d @8.000000008 b; touch -d @9.000000009 x; touch -d @1.000000001 .',
      ),
      { a: 'dir', b: 'dir', 'b/z': 'z', 'b/y': 'dir', 'b/y/g': 'g', x: 'dir', 'x/f': 'f' },
    ))

  test.each(['..', '.', 'a/b', '/x/', '//x', '/', '', '/a/../b'])(
    'R31: the hostile redirect %j is refused before anything is touched',
    async (to) => {
      const directory = fresh()
      buildTree(`${directory}/u`, dir({ d: redirected(to) }))
      buildTree(`${directory}/l`, dir({ d: dir({ f: file('f') }), x: dir() }))
      const before = [readTree(`${directory}/u`), readTree(`${directory}/l`)]
      for (const mode of ['output', 'delta', 'in-place'] as const) {
        const output = mode === 'in-place' ? {} : { output: `${directory}/new` }
        const request = {
          upper: `${directory}/u`,
          lowers: [`${directory}/l`],
          mode,
          namespace: 'trusted',
          workers: 0,
          ...output,
        } as const
        await expect(engine.merge(request)).rejects.toMatchObject({ code: expect.stringMatching(/^[A-Z_]+$/) })
        expect(existsSync(`${directory}/new`)).toBe(false)
      }
      expect([readTree(`${directory}/u`), readTree(`${directory}/l`)]).toEqual(before)
    },
  )

  test('R31: a redirect counts up to its first NUL', () =>
    expectMerged([dir({ e: redirected('t\0x'), t: whiteout() }), dir({ t: dir({ f: file('f') }) })], {
      e: 'dir',
      'e/f': 'f',
    }))

  test('R32: a thousand whiteouts that share inodes are whiteouts each', async () => {
    const names = Array.from({ length: 1000 }, (_, n) => `n${n}`)
    await expectChanged(
      [dir({ d: dir(Object.fromEntries(names.map((name) => [name, file()]))), k: file('k') })],
      shell('cd d; rm n*; touch last'),
      { d: 'dir', 'd/last': '', k: 'k' },
    )
  })

  test('R33: fifos, sockets and devices are made anew and never opened', () =>
    expectMerged(
      [
        dir({ p: fifo({ mode: 0o600, uid: 3 }), s: socket(), mem: character(1, 1, { mode: 0o640, gid: 15 }) }),
        dir({ p: file('p'), old: fifo() }),
      ],
      {
        mem: 'character',
        old: 'fifo',
        p: 'fifo',
        s: 'socket',
      },
    ))

  test('R34: attributes that the target cannot hold are refused before anything is changed', async () => {
    const directory = fresh()
    const tmpfs = `${directory}/tmpfs`
    mkdirSync(tmpfs)
    mount('tmpfs', tmpfs, 'tmpfs', 0, 'size=16m')
    try {
      buildTree(`${tmpfs}/u`, dir({ ok: file('ok'), f: file('f', { xattrs: { 'user.b': 'a'.repeat(30_000) } }) }))
      buildTree(`${directory}/l`, dir({ z: file('z') }))
      const before = readTree(`${directory}/l`)
      await expect(
        engine.merge({
          upper: `${tmpfs}/u`,
          lowers: [`${directory}/l`],
          mode: 'in-place',
          namespace: 'trusted',
          workers: 0,
        }),
      ).rejects.toMatchObject({ code: expect.any(String) })
      await engine
        .recover({
          upper: `${tmpfs}/u`,
          lowers: [`${directory}/l`],
          mode: 'in-place',
          namespace: 'trusted',
          workers: 0,
        })
        .catch(() => undefined)
      expect(readTree(`${directory}/l`)).toEqual(before)
      expect(outline(readTree(`${tmpfs}/u`))).toEqual({ ok: 'ok', f: 'f' })
    } finally {
      unmount(tmpfs)
    }
  })

  test('R35: names that AUFS would take for whiteouts are names', () =>
    expectMerged(
      [
        dir({ '.wh.f': file('1'), d: dir({ '.wh..wh..opq': file('') }) }),
        dir({ f: file('f'), d: dir({ g: file('g') }), '.wh.g': file('2') }),
      ],
      {
        '.wh.f': '1',
        '.wh.g': '2',
        d: 'dir',
        'd/.wh..wh..opq': '',
        'd/g': 'g',
        f: 'f',
      },
    ))

  test('a sparse file stays sparse in every mode', async () => {
    const view = await expectMerged(
      [dir({ s: sparse(8_000_000, [[6_000_000, 'x']]) }), dir({ t: sparse(3_000_000, [[0, 'y']]), s: file('small') })],
      {
        s: expect.stringMatching(/^sha1:/) as unknown as string,
        t: expect.stringMatching(/^sha1:/) as unknown as string,
      },
    )
    expect(view.get('s')?.dataBytes).toBeLessThan(100_000)
  })

  test('names made in several lowers and links across directories', async () => {
    const view = await expectMerged(
      [
        dir({ a: file('u'), x: dir({ l: linkTo('a') }) }),
        dir({ x: dir({ m: file('m'), n: linkTo('x/m') }), y: linkTo('x/m') }),
        dir({ x: dir({ o: file('o') }), z: linkTo('x/o') }),
      ],
      { a: 'u', x: 'dir', 'x/l': 'u', 'x/m': 'm', 'x/n': 'm', 'x/o': 'o', y: 'm', z: 'o' },
    )
    expect(view.get('y')?.links).toEqual(['x/m', 'x/n', 'y'])
    expect(view.get('z')?.links).toEqual(['x/o', 'z'])
  })

  test('an upper that holds nothing changes nothing but the root', () =>
    expectMerged(
      [dir({}, { mode: 0o700, uid: 1, mtimeNs: 1n }), dir({ d: dir({ f: file('f') }) }, { xattrs: { 'user.x': '1' } })],
      { d: 'dir', 'd/f': 'f' },
    ))

  test('everything deleted leaves an empty tree, when that is allowed', async () => {
    const directory = fresh()
    buildTree(`${directory}/u`, dir({ a: whiteout(), b: whiteout() }))
    buildTree(`${directory}/l1`, dir({ a: file('a'), b: dir({ c: file('c') }) }))
    const request = {
      upper: `${directory}/u`,
      lowers: [`${directory}/l1`],
      mode: 'output',
      output: `${directory}/new`,
      namespace: 'trusted',
      workers: 0,
    } as const
    await expect(engine.merge(request)).rejects.toMatchObject({ hint: expect.any(String) })
    expect(existsSync(`${directory}/new`)).toBe(false)
    await engine.merge({ ...request, allowEmpty: true })
    expect(outline(readTree(`${directory}/new`))).toEqual({})
  })

  test('layers on other file systems: the upper on tmpfs, the lower on ext4, merged in place', async () => {
    const directory = fresh()
    const tmpfs = `${directory}/tmpfs`
    mkdirSync(tmpfs)
    mount('tmpfs', tmpfs, 'tmpfs', 0, 'size=64m')
    try {
      buildTree(
        `${directory}/l1`,
        dir({ d: dir({ a: file('a'), x: file('x') }), s: file('s'), g: file('g'), h: linkTo('g') }),
      )
      mkdirSync(`${tmpfs}/u`)
      const operations: Operation[] = [
        { do: 'write', path: 'd/new', content: 'new' },
        { do: 'unlink', path: 'd/x' },
        { do: 'rename', path: 'd', to: 'e' },
        { do: 'link', path: 'e/new', to: 'l' },
        { do: 'chmod', path: 'g', mode: 0o600 },
        { do: 'setcap', path: 's', capabilities: 0x400 },
        { do: 'punch', path: 'holes', sizeBytes: 300_000, offset: 131_072 },
        { do: 'mknod', path: 'p', type: 'fifo', major: 0, minor: 0 },
      ]
      const [lowers, upper, work] = [[`${directory}/l1`], `${tmpfs}/u`, `${tmpfs}/w`]
      withOverlay({ lowers, upper, work }, withRedirects, (merged) => applyOperations(merged, operations))
      const layers = [upper, ...lowers]
      const subject = { directory, layers, work, options: withRedirects, clones: ['auto', 'copy'] as const }
      await expectNone(mergeEveryWay(subject), describeLayers(layers))
      expect(statSync(`${directory}/l1/p`).isFIFO()).toBe(true)
    } finally {
      unmount(tmpfs)
    }
  })

  test('a default ACL of the directory beside the target reaches nothing that passes through there', async () => {
    const directory = fresh()
    const tmpfs = `${directory}/tmpfs`
    mkdirSync(tmpfs)
    mount('tmpfs', tmpfs, 'tmpfs', 0, 'size=64m')
    try {
      const near = `${directory}/near`
      mkdirSync(near)
      // Through the journal go: a copy across file systems, a redirect's target that shows twice, a new version.
      buildTree(
        `${tmpfs}/u`,
        dir({ new: file('new', { mode: 0o640 }), n: dir({ p: fifo() }), e: redirected('d'), f: redirected('d') }),
      )
      buildTree(`${near}/l`, dir({ d: dir({ a: file('a', { mode: 0o640 }), b: dir({ c: file('c') }) }) }))
      applyOperations(near, [{ do: 'setfacl', path: '', which: 'default', uid: 9, permissions: 7 }])
      const subject = {
        directory: near,
        layers: [`${tmpfs}/u`, `${near}/l`],
        options: withRedirects,
        clones: ['copy'] as const,
        diff: { links: false }, // one inode that shows in two places is two in a plain tree
      }
      expect(outline(viewOf(subject))).toMatchObject({ new: 'new', 'n/p': 'fifo', 'e/a': 'a', 'f/b/c': 'c' })
      await expectNone(mergeEveryWay(subject), describeLayers(subject.layers))
    } finally {
      unmount(tmpfs)
    }
  })
})
