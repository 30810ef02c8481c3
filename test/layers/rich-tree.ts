import type { HostPath } from '../../packages/posix/src/index.ts'
import {
  block,
  buildTree,
  character,
  type DirectorySpec,
  dir,
  fifo,
  file,
  linkTo,
  sparse,
  symlink,
} from '../support/build.ts'
import { aclOf, capabilityOf } from '../support/operations.ts'

/** A plain tree with everything that a tar can hold, and most of what makes tar readers stumble. */
export function richTree(): DirectorySpec {
  return dir(
    {
      a: file('content', { mode: 0o4755, xattrs: { 'security.capability': capabilityOf(1).toString('latin1') } }),
      b: linkTo('a'),
      binary: file('x', { xattrs: { 'user.bin': '\0\n\xff=\x80', 'user.empty': '', 'trusted.t': '\xc3\xa9' } }),
      acl: file('y', { mode: 0o640, xattrs: { 'system.posix_acl_access': aclOf(5, 6).toString('latin1') } }),
      bytes: dir({ '\xff\xfe': file('1'), 'x\ny': file('2'), 'q\\"\t': file('3'), '\xc3\xa9': file('4') }),
      dots: dir({ '...': file('5'), '-rf': file('6'), ' ': file('7') }),
      ids: file('z', { uid: 3_000_000, gid: 100_000, mode: 0 }),
      dev: dir({ null: character(1, 3), disk: block(259, 300), pipe: fifo({ mode: 0o622 }) }, { mode: 0o1777 }),
      ['l'.repeat(255)]: dir({ ['m'.repeat(200)]: dir({ ['n'.repeat(255)]: file('deep') }) }),
      holes: sparse(3_000_000, [
        [500_000, 'middle'],
        [2_999_990, 'end'],
      ]),
      'holes at the end': sparse(1_000_000, [[0, 'start']]),
      'only a hole': sparse(700_000),
      'many pieces': sparse(
        4_000_000,
        Array.from({ length: 60 }, (_, i) => [i * 65_536, `piece ${i}`] as const),
      ),
      link: symlink(`../${'t'.repeat(300)}`),
      'link bytes': symlink('\xff/\xfe'),
      old: file('before the epoch', { mtimeNs: -1_500_000_000n }),
      late: file('after 2242', { mtimeNs: 9_000_000_000_123_456_789n }),
      setgid: dir(
        { f: file('') },
        { mode: 0o2775, gid: 7, xattrs: { 'system.posix_acl_default': aclOf(9, 7).toString('latin1') } },
      ),
    },
    { mode: 0o711, uid: 4, gid: 5 },
  )
}

export function buildRichTree(path: string): HostPath {
  buildTree(path, richTree())
  return path as HostPath
}
