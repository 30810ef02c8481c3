import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { type ByteString, close, makeDirectory } from '@lsync/posix'
import fc from 'fast-check'
import tar from 'tar-stream'
import { expect, test } from 'vitest'
import { type Abilities, anyLayer, itemsOf, observed } from '../../../../test/layers/any-layer.ts'
import { makeScratch } from '../../../../test/layers/scratch.ts'
import { aufsTreeForm, readAufsTree } from './aufs.ts'
import { openDirectory } from './inode.ts'
import type { LayerItem } from './item.ts'
import { kernelTreeForm, readKernelLayer } from './kernel.ts'
import { plainTreeForm, readPlainTree } from './plain.ts'
import { PortableSink, readPortableLayer } from './portable.ts'
import { DirectorySpool } from './spool.ts'
import { readTarLayer, TarSink, type TarSinkOptions } from './tar.ts'
import { type LayerSink, type TreeForm, TreeSink } from './tree-sink.ts'

const ORDER = { order: 'whiteouts-first' } as const

/** One scratch place: where content lies, where the form is written, and a spool. */
async function inPlace<T>(use: (place: { content: number; layer: number; spool: number }) => Promise<T>): Promise<T> {
  const scratch = makeScratch()
  const open = ['content', 'layer', 'spool'].map((name) => {
    makeDirectory(scratch.fd, name as ByteString, 0o700)
    return openDirectory(scratch.fd, name as ByteString)
  })
  try {
    const [content, layer, spool] = open as [number, number, number]
    return await use({ content, layer, spool })
  } finally {
    for (const fd of open) close(fd)
    scratch.remove()
  }
}

async function fill(sink: LayerSink, items: readonly LayerItem[]): Promise<void> {
  try {
    for (const item of items) await sink.add(item)
    await sink.finish()
  } finally {
    sink.close()
  }
}

const mine: Abilities = { whiteouts: true, opaque: true, sockets: true }

/** readlink(2) moves the access time of a symlink, and nothing can ask it not to. */
function withoutLinkTime(observed: unknown): unknown {
  const { kind, meta } = observed as { kind: string; meta?: object }
  return kind === 'symlink' ? { ...(observed as object), meta: { ...meta, atimeNs: 0n } } : observed
}

function treeRoundTrip(form: TreeForm, read: (fd: number) => Iterable<LayerItem>, abilities: Abilities) {
  return fc.assert(
    fc.asyncProperty(anyLayer(abilities), (models) =>
      inPlace(async ({ content, layer }) => {
        const items = itemsOf(models, content)
        await fill(new TreeSink(layer, { form }), items)
        expect(observed(read(layer)).map(withoutLinkTime)).toEqual(observed(items).map(withoutLinkTime))
      }),
    ),
    { numRuns: 60 },
  )
}

test('a layer written as a kernel layer with user marks reads back the same', () =>
  treeRoundTrip(kernelTreeForm('user', 'device'), (fd) => readKernelLayer(fd, { ...ORDER, namespace: 'user' }), {
    ...mine,
    whNames: true,
  }))

test('a layer written with xattr whiteouts reads back the same but for their form', () =>
  fc.assert(
    fc.asyncProperty(anyLayer({ ...mine, whNames: true }), (models) =>
      inPlace(async ({ content, layer }) => {
        const items = itemsOf(models, content)
        await fill(new TreeSink(layer, { form: kernelTreeForm('user', 'xattr') }), items)
        const expected = observed(items).map((entry) =>
          (entry as { kind: string }).kind === 'whiteout' ? { ...(entry as object), form: 'xattr' } : entry,
        )
        const back = observed(readKernelLayer(layer, { ...ORDER, namespace: 'user' }))
        expect(back.map(withoutLinkTime)).toEqual(expected.map(withoutLinkTime))
      }),
    ),
    { numRuns: 60 },
  ))

test('a layer written as a .wh. tree reads back the same', () =>
  treeRoundTrip(aufsTreeForm(), (fd) => readAufsTree(fd, ORDER), { ...mine, shortWhiteouts: true }))

test('a plain tree reads back the same', () =>
  treeRoundTrip(plainTreeForm(), (fd) => readPlainTree(fd), { sockets: true, whNames: true }))

const everything: Abilities = {
  whiteouts: true,
  opaque: true,
  redirects: true,
  metacopies: true,
  devices: true,
  sockets: true,
  anyOwner: true,
  trustedXattrs: true,
  whNames: true,
}

test('the portable form holds every layer exactly, without any privilege', () =>
  fc.assert(
    fc.asyncProperty(anyLayer(everything), (models) =>
      inPlace(async ({ content, layer }) => {
        const items = itemsOf(models, content)
        await fill(new PortableSink(layer), items)
        const back = [...readPortableLayer(layer)]
        // Data is only with the first name of a group.
        expect(observed(back).map(withoutFurtherContent)).toEqual(observed(items).map(withoutFurtherContent))
      }),
    ),
    { numRuns: 100 },
  ))

function withoutFurtherContent(entry: unknown): unknown {
  const { content, ...rest } = entry as { content?: string; links?: string; path: string; sizeBytes?: number }
  if (rest.links !== undefined && rest.links !== rest.path) return rest
  return content === undefined || content === '' ? rest : { ...rest, content }
}

function tarRoundTrip(options: TarSinkOptions, abilities: Abilities) {
  return fc.assert(
    fc.asyncProperty(anyLayer(abilities), (models) =>
      inPlace(async ({ content, spool }) => {
        const items = itemsOf(models, content)
        const { index } = await readTarLayer(written(items, options), {
          form: options.form,
          spool: new DirectorySpool(spool),
        })
        expect(observed(index.items('whiteouts-first'))).toEqual(observed(items.map(withoutAccessTime)))
      }),
    ),
    { numRuns: 100 },
  )
}

/** As tar holds it. */
function withoutAccessTime(item: LayerItem): LayerItem {
  const { entry } = item
  if (entry.kind === 'whiteout') return item
  return { ...item, entry: { ...entry, meta: { ...entry.meta, atimeNs: entry.meta.mtimeNs } } }
}

async function* written(items: readonly LayerItem[], options: TarSinkOptions): AsyncGenerator<Uint8Array> {
  const sink = new TarSink(options)
  const filling = (async () => {
    for (const item of items) await sink.add(item)
    await sink.finish()
  })().catch((error) => sink.fail(error))
  yield* sink.chunks()
  await filling
}

const archived: Abilities = { ...everything, sockets: false }

test('an OCI layer reads back the same, without any privilege', () =>
  tarRoundTrip({ form: 'oci' }, { ...archived, redirects: false, metacopies: false, whNames: false }))

test.each([true, false])('the tar of a raw layer reads back the same (sparse: %s)', (sparse) =>
  tarRoundTrip({ form: 'trusted', sparse }, archived),
)

test('the tar of a plain tree reads back the same', () =>
  tarRoundTrip(
    { form: 'plain', sparse: true },
    { ...archived, whiteouts: false, opaque: false, redirects: false, metacopies: false },
  ))

test('the same layer gives the same archive, byte for byte', () =>
  fc.assert(
    fc.asyncProperty(anyLayer({ ...archived, redirects: false, metacopies: false, whNames: false }), (models) =>
      inPlace(async ({ content }) => {
        const items = itemsOf(models, content)
        const bytes = () => Array.fromAsync(written(items, { form: 'oci' })).then((parts) => Buffer.concat(parts))
        expect((await bytes()).equals(await bytes())).toBe(true)
      }),
    ),
    { numRuns: 20 },
  ))

test('tar-stream, which shares no code with the writer, finds the same names and bodies', () =>
  fc.assert(
    fc.asyncProperty(anyLayer({ ...archived, redirects: false, metacopies: false, whNames: false }), (models) =>
      inPlace(async ({ content }) => {
        const items = itemsOf(models, content)
        const extract = tar.extract()
        const failing = pipeline(Readable.from(written(items, { form: 'oci' })), extract)
        const found: string[] = []
        for await (const entry of extract) {
          const body = Buffer.concat(await Array.fromAsync(entry as AsyncIterable<Uint8Array>))
          // It reads names as UTF-8, so bytes that are not are compared by their sizes alone.
          found.push(`${entry.header.type} ${body.length} ${isAscii(entry.header.name) ? entry.header.name : ''}`)
        }
        await failing
        expect(found).toHaveLength(items.length + opaqueMarkers(items))
        const files = observed(items).filter((entry) => (entry as { kind: string }).kind === 'file') as {
          path: string
          content: string
          links?: string
        }[]
        for (const { path, content, links } of files) {
          const isLink = links !== undefined && links !== path
          if (isAscii(path)) expect(found).toContain(`${isLink ? 'link 0' : `file ${content.length}`} ${path}`)
        }
      }),
    ),
    { numRuns: 40 },
  ))

const isAscii = (text: string) => /^[\x20-\x7e]*$/.test(text)

function opaqueMarkers(items: readonly LayerItem[]): number {
  return items.filter(({ entry }) => entry.kind === 'directory' && entry.opaque).length
}
