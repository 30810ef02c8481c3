import { chmodSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { PassThrough, Writable } from 'node:stream'
import { type ByteString, hostPath, makeNode, openRoot, S_IFCHR, setXattr, withFd } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { outlineOf } from '../../../../test/layers/outline.ts'
import { scratch } from '../../../../test/layers/scratch.ts'
import { convertLayer, exportLayer, importLayer, type LayerForm } from './convert.ts'
import { readKernelLayer } from './kernel.ts'
import { encodeHeader } from './tar-header.ts'

/** A small upper with user marks, which needs no privilege, at `up` in a scratch directory. */
function place() {
  const made = scratch()
  const up = `${made.path}/up`
  mkdirSync(`${up}/d`, { recursive: true })
  writeFileSync(`${up}/d/f`, 'content')
  writeFileSync(`${up}/big`, Buffer.alloc(300_000, 'x'))
  symlinkSync('../../etc', `${up}/link`)
  withFd(openRoot(made.host('up')), (fd) => {
    makeNode(fd, 'gone' as ByteString, S_IFCHR, 0)
    setXattr(fd, 'd' as ByteString, 'user.overlay.opaque' as ByteString, Buffer.from('y'))
  })
  return made
}

const LAYER = { big: '300000 bytes', d: 'dir opaque', 'd/f': 'content', gone: 'whiteout', link: '-> ../../etc' }

function outline(path: string): Record<string, string> {
  return withFd(openRoot(hostPath(path)), (fd) => outlineOf(readKernelLayer(fd, { namespace: 'user' })))
}

test.each([
  ['kernel-user', 'aufs', 'oci', 'xattr-whiteouts', 'portable', 'tar', 'kernel-user'],
  ['portable', 'oci', 'tar', 'aufs', 'kernel-user'],
] as LayerForm[][])('a layer comes back whole from a round through %s, %s, %s, …', async (...forms) => {
  const { path, host } = place()
  let from = 'up'
  let fromForm: LayerForm = 'kernel-user'
  for (const [index, toForm] of forms.filter(Boolean).entries()) {
    const to = `step${index}`
    const request = { from: host(from), fromForm, to: host(to), toForm, namespace: 'user', durable: false } as const
    const report = await convertLayer(request)
    expect(report).toMatchObject({ entries: 6, bytes: 300_007, losses: [] })
    from = to
    fromForm = toForm
  }
  expect(outline(`${path}/${from}`)).toEqual(LAYER)
  expect(readdirSync(path).filter((name) => name.startsWith('.'))).toEqual([])
})

test.each(['none', 'gzip', 'zstd'] as const)(
  'an OCI layer packed with %s is read without being told',
  async (compression) => {
    const { path, host } = place()
    const exported = await exportLayer({
      from: host('up'),
      namespace: 'user',
      form: 'oci',
      to: host('l.tar'),
      compression,
    })
    expect(exported.archive).toMatchObject({
      bytes: readFileSync(`${path}/l.tar`).length,
      digest: expect.stringMatching(/^sha256:[0-9a-f]{64}$/),
    })
    await importLayer({ from: host('l.tar'), form: 'oci', to: host('in'), namespace: 'user' })
    expect(outline(`${path}/in`)).toEqual(LAYER)
  },
)

test('an export to a stream is the same bytes as one to a file, and a stream can be imported', async () => {
  const { path, host } = place()
  const request = { from: host('up'), namespace: 'user', form: 'oci', compression: 'gzip' } as const
  const toFile = await exportLayer({ ...request, to: host('l.tar') })
  const parts: Buffer[] = []
  const stream = new Writable({
    write(chunk, _encoding, done) {
      parts.push(chunk)
      setImmediate(done)
    },
  })
  const toStream = await exportLayer({ ...request, to: stream })
  expect(toStream.archive).toEqual(toFile.archive)
  expect(Buffer.concat(parts).equals(readFileSync(`${path}/l.tar`))).toBe(true)
  await importLayer({ from: toAsync(parts), form: 'oci', to: host('in'), namespace: 'user' })
  expect(outline(`${path}/in`)).toEqual(LAYER)
})

async function* toAsync(parts: readonly Buffer[]): AsyncGenerator<Buffer> {
  yield* parts
}

describe('what goes wrong leaves nothing behind', () => {
  const leftovers = (path: string) => readdirSync(path).filter((name) => !['up', 'l.tar', 'cut.tar'].includes(name))

  test('a form that cannot hold the layer', async () => {
    const { path, host } = place()
    const request = { from: host('up'), namespace: 'user', form: 'plain', to: host('out') } as const
    await expect(exportLayer(request)).rejects.toMatchObject({ code: 'NOT_EXPRESSIBLE', path: 'gone' })
    expect(leftovers(path)).toEqual([])
  })

  test('a redirect in an OCI layer, with the command that helps', async () => {
    const { path, host } = place()
    withFd(openRoot(host('up')), (fd) =>
      setXattr(fd, '' as never, 'user.overlay.redirect' as ByteString, Buffer.from('x')),
    )
    mkdirSync(`${path}/up/e`)
    withFd(openRoot(host('up')), (fd) =>
      setXattr(fd, 'e' as ByteString, 'user.overlay.redirect' as ByteString, Buffer.from('x')),
    )
    const request = { from: host('up'), namespace: 'user', form: 'oci', to: host('out'), compression: 'zstd' } as const
    await expect(exportLayer(request)).rejects.toMatchObject({
      code: 'NEEDS_DEREF',
      path: 'e',
      hint: expect.stringContaining('lsync deref'),
    })
    expect(leftovers(path)).toEqual([])
  })

  test('a cut archive', async () => {
    const { path, host } = place()
    writeFileSync(`${path}/l.tar`, encodeHeader({ name: 'a', type: '0', sizeBytes: 10_000 }))
    const request = { from: host('l.tar'), form: 'oci', to: host('out'), namespace: 'user' } as const
    await expect(importLayer(request)).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN', path: 'a' })
    expect(leftovers(path)).toEqual([])
  })

  test.each([0, 1])('a signal after %i events of progress', async (events) => {
    const { path, host } = place()
    for (let i = 0; i < 5000; i++) writeFileSync(`${path}/up/d/file${i}`, 'x'.repeat(i))
    const controller = new AbortController()
    let seen = 0
    if (events === 0) controller.abort()
    const running = exportLayer({
      from: host('up'),
      namespace: 'user',
      form: 'portable',
      to: host('out'),
      durable: false,
      signal: controller.signal,
      onProgress: () => {
        if (++seen >= events) controller.abort()
      },
    })
    await expect(running).rejects.toMatchObject({ name: 'AbortError' })
    expect(leftovers(path)).toEqual([])
  })

  test('a signal while a stream that is imported stands still', async () => {
    const { path, host } = place()
    const controller = new AbortController()
    const stalled = new PassThrough()
    stalled.write(encodeHeader({ name: 'a', type: '0', sizeBytes: 10_000 }))
    const request = {
      from: stalled,
      form: 'oci',
      to: host('out'),
      namespace: 'user',
      signal: controller.signal,
    } as const
    const running = importLayer(request)
    setTimeout(() => controller.abort(), 20)
    await expect(running).rejects.toMatchObject({ name: 'AbortError' })
    expect(leftovers(path)).toEqual([])
  })

  test('descriptors', async () => {
    const { path, host } = place()
    const open = () => readdirSync('/proc/self/fd').length
    await exportLayer({ from: host('up'), namespace: 'user', form: 'oci', to: host('l.tar') })
    const whole = readFileSync(`${path}/l.tar`)
    writeFileSync(`${path}/cut.tar`, whole.subarray(0, whole.length - 5000))
    const before = open()
    for (let i = 0; i < 5; i++) {
      const failing = [
        importLayer({ from: host('cut.tar'), form: 'oci', to: host('out'), namespace: 'user' }),
        importLayer({
          from: host('l.tar'),
          form: 'oci',
          to: host('out2'),
          namespace: 'user',
          limits: { maxEntries: 1 },
        }),
        exportLayer({ from: host('up'), namespace: 'user', form: 'plain', to: host('out3') }),
      ]
      for (const result of await Promise.allSettled(failing)) expect(result.status).toBe('rejected')
    }
    // A file stream closes its file a little later.
    await expect.poll(open).toBeLessThanOrEqual(before)
  })

  test('a stream whose reader goes away', async () => {
    const { host } = place()
    const stream = new PassThrough()
    const running = exportLayer({ from: host('up'), namespace: 'user', form: 'oci', to: stream })
    stream.once('data', () => stream.destroy(new Error('the reader has enough')))
    await expect(running).rejects.toThrow('the reader has enough')
  })

  test('a target that exists', async () => {
    const { path, host } = place()
    mkdirSync(`${path}/out`)
    writeFileSync(`${path}/out/kept`, 'kept')
    for (const form of ['portable', 'oci'] as const) {
      const request = { from: host('up'), namespace: 'user', form, to: host('out') } as const
      await expect(exportLayer(request)).rejects.toMatchObject({ code: 'OUTPUT_EXISTS' })
    }
    expect(readFileSync(`${path}/out/kept`, 'utf8')).toBe('kept')
    expect(leftovers(path)).toEqual(['out'])
  })

  test('a target inside the layer, also through a symlink', async () => {
    const { path, host } = place()
    symlinkSync(`${path}/up/d`, `${path}/way`)
    for (const to of ['up/d/out', 'way/out']) {
      const request = { from: host('up'), namespace: 'user', form: 'portable', to: host(to) } as const
      await expect(exportLayer(request)).rejects.toMatchObject({ code: 'TARGET_INSIDE_SOURCE' })
    }
  })
})

test('an empty directory may be the target', async () => {
  const { path, host } = place()
  mkdirSync(`${path}/in`)
  const request = { from: host('up'), fromForm: 'kernel-user', to: host('in'), toForm: 'kernel-user' } as const
  await convertLayer(request)
  expect(outline(`${path}/in`)).toEqual(LAYER)
})

describe('the policy for setuid files', () => {
  const request = (made: ReturnType<typeof place>) => {
    chmodSync(`${made.path}/up/d/f`, 0o6755)
    return { from: made.host('up'), namespace: 'user', form: 'portable', to: made.host('out') } as const
  }

  test('keeps them unless told otherwise', async () => {
    const made = place()
    await exportLayer(request(made))
    expect(readFileSync(`${made.path}/out/.lsync-layer.jsonl`, 'utf8')).toContain('"mode":"6755"')
  })

  test('clears them, and says so', async () => {
    const made = place()
    const report = await exportLayer({ ...request(made), setuid: 'clear' })
    expect(report.losses).toEqual([{ path: 'd/f', what: 'setuid, setgid or file capabilities' }])
    expect(readFileSync(`${made.path}/out/.lsync-layer.jsonl`, 'utf8')).not.toContain('"mode":"6755"')
  })

  test('refuses them by name', async () => {
    const made = place()
    await expect(exportLayer({ ...request(made), setuid: 'refuse' })).rejects.toMatchObject({
      code: 'ENTRY_REFUSED',
      path: 'd/f',
    })
  })
})
