import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  existsSync,
  mkdirSync,
  readdirSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { gzipSync, zstdCompressSync } from 'node:zlib'
import { exportImage, importImage } from '@lsync/snapshot'
import { describe, expect, test } from 'vitest'
import { scratch } from '../layers/scratch.ts'

const OCI = 'application/vnd.oci.image'
const namespace = 'user'

interface Blob {
  mediaType: string
  digest: string
  size: number
  [field: string]: unknown
}

/** A layout that is made by hand, in which everything may be wrong. */
function layout() {
  const made = scratch()
  const root = `${made.path}/image`
  mkdirSync(`${root}/blobs/sha256`, { recursive: true })
  writeFileSync(`${root}/oci-layout`, '{"imageLayoutVersion": "1.0.0"}')
  const digestOf = (content: Uint8Array) => `sha256:${createHash('sha256').update(content).digest('hex')}`
  const pathOf = (digest: string) => `${root}/blobs/${digest.replace(':', '/')}`
  const put = (mediaType: string, content: Uint8Array | object): Blob => {
    const bytes = content instanceof Uint8Array ? content : Buffer.from(JSON.stringify(content))
    const digest = digestOf(bytes)
    writeFileSync(pathOf(digest), bytes)
    return { mediaType, digest, size: bytes.length }
  }
  const putConfig = (diffIds: readonly string[], more: object = {}) =>
    put(`${OCI}.config.v1+json`, {
      os: 'linux',
      architecture: 'amd64',
      rootfs: { type: 'layers', diff_ids: diffIds },
      ...more,
    })
  const putManifest = (config: Blob, layers: readonly Blob[], more: object = {}) =>
    put(`${OCI}.manifest.v1+json`, { schemaVersion: 2, config, layers, ...more })
  const index = (manifests: readonly unknown[], more: object = {}) =>
    writeFileSync(`${root}/index.json`, JSON.stringify({ schemaVersion: 2, manifests, ...more }))
  /** An image of one layer that is all right, but for what `change` does to its documents. */
  const image = (
    archive: Uint8Array = PLAIN,
    change: { type?: string; diffId?: string; layer?: object; compressed?: Uint8Array } = {},
  ) => {
    const layer = put(change.type ?? `${OCI}.layer.v1.tar`, change.compressed ?? archive)
    const config = putConfig([change.diffId ?? digestOf(archive)])
    const manifest = putManifest(config, [{ ...layer, ...change.layer }])
    index([manifest])
    return { layer, config, manifest }
  }
  const read = () => importImage({ layout: made.host('image'), to: made.host('to'), namespace })
  /** What is there besides the layout: nothing may be left. */
  const left = () => readdirSync(made.path).filter((name) => name !== 'image')
  return { ...made, root, put, putConfig, putManifest, index, image, read, left, pathOf, digestOf }
}

function tar(files: Readonly<Record<string, string>>): Buffer {
  const script = `import sys, tarfile, io, json
out = tarfile.open(fileobj=sys.stdout.buffer, mode='w|')
for name, content in json.load(sys.stdin).items():
    info = tarfile.TarInfo(name)
    info.size = len(content)
    out.addfile(info, io.BytesIO(content.encode()))
out.close()`
  return execFileSync('python3', ['-c', script], { input: JSON.stringify(files) })
}

const PLAIN = tar({ f: 'content' })

describe('an image layout that means harm', () => {
  test('one that means none is imported', async () => {
    for (const [type, compressor] of [
      ['tar', (bytes: Buffer) => bytes],
      ['tar+gzip', gzipSync],
      ['tar+zstd', zstdCompressSync],
    ] as const) {
      const { image, read, left } = layout()
      const archive = PLAIN
      image(archive, { type: `${OCI}.layer.v1.${type}`, compressed: compressor(archive) })
      expect((await read()).layers).toMatchObject([{ entries: 2, bytes: 7 }])
      expect(left()).toEqual(['to'])
    }
  })

  const WRONG: [string, (made: ReturnType<typeof layout>) => void, string, string][] = [
    ['no layout at all', ({ root }) => rmSync(`${root}/oci-layout`), 'IMAGE_INVALID', 'no file oci-layout'],
    [
      'another version',
      ({ root }) => writeFileSync(`${root}/oci-layout`, '{"imageLayoutVersion":"2.0.0"}'),
      'IMAGE_INVALID',
      'version is unknown',
    ],
    ['an index that is no JSON', ({ root }) => writeFileSync(`${root}/index.json`, '{'), 'IMAGE_INVALID', 'not JSON'],
    ['an index that is a list', ({ root }) => writeFileSync(`${root}/index.json`, '[]'), 'IMAGE_INVALID', 'no object'],
    ['an index of another schema', ({ index }) => index([], { schemaVersion: 1 }), 'IMAGE_INVALID', 'schema version'],
    ['manifests that are no list', ({ index }) => index({} as never), 'IMAGE_INVALID', 'are no list'],
    ['no image', ({ index }) => index([]), 'IMAGE_NOT_FOUND', 'it has none'],
    [
      'an index as long as a disk',
      ({ root, index }) => {
        index([])
        truncateSync(`${root}/index.json`, 1e12)
      },
      'IMAGE_INVALID',
      'longer than',
    ],
    [
      'a digest that is a path',
      ({ index }) => index([{ mediaType: `${OCI}.manifest.v1+json`, digest: 'sha256:../../../etc/passwd', size: 1 }]),
      'IMAGE_INVALID',
      'none of SHA-256',
    ],
    [
      'a size that is none',
      ({ index, image }) => index([{ ...image().manifest, size: -1 }]),
      'IMAGE_INVALID',
      'has no size',
    ],
    [
      'a manifest with other bytes',
      ({ image, pathOf }) => {
        const { manifest } = image()
        writeFileSync(pathOf(manifest.digest), Buffer.alloc(manifest.size, ' '))
      },
      'BLOB_DAMAGED',
      'another digest',
    ],
    [
      'a manifest that is a symlink',
      ({ image, pathOf, path }) => {
        const at = pathOf(image().manifest.digest)
        renameSync(at, `${path}/image/elsewhere`)
        symlinkSync(`${path}/image/elsewhere`, at)
      },
      'IMAGE_INVALID',
      'is a symlink',
    ],
    [
      'blobs that are a symlink',
      ({ image, root }) => {
        image()
        renameSync(`${root}/blobs`, `${root}/elsewhere`)
        symlinkSync('elsewhere', `${root}/blobs`)
      },
      'IMAGE_INVALID',
      'is a symlink',
    ],
    [
      'a layer that is a fifo',
      ({ image, pathOf }) => {
        const at = pathOf(image().layer.digest)
        rmSync(at)
        execFileSync('mkfifo', [at])
      },
      'IMAGE_INVALID',
      'is no file',
    ],
    [
      'a layer that is missing',
      ({ image, pathOf }) => rmSync(pathOf(image().layer.digest)),
      'IMAGE_INVALID',
      'missing',
    ],
    [
      'a layer with other bytes',
      ({ image, pathOf }) => {
        const { layer } = image()
        const other = tar({ f: 'CONTENT' })
        expect(other.length).toBe(layer.size)
        writeFileSync(pathOf(layer.digest), other)
      },
      'BLOB_DAMAGED',
      'another digest',
    ],
    [
      'a layer that goes on behind its size',
      ({ image, pathOf }) => truncateSync(pathOf(image().layer.digest), 1e12),
      'BLOB_DAMAGED',
      'longer than it should be',
    ],
    [
      'a layer that is cut short',
      ({ image, pathOf }) => truncateSync(pathOf(image().layer.digest), 600),
      'ARCHIVE_BROKEN',
      'ends too early',
    ],
    [
      'a diff id of something else',
      ({ image }) => void image(undefined, { diffId: `sha256:${'0'.repeat(64)}` }),
      'BLOB_DAMAGED',
      'not that of the diff id',
    ],
    [
      'a layer of an unknown kind',
      ({ image }) => void image(undefined, { type: `${OCI}.layer.v1.tar+encrypted` }),
      'IMAGE_INVALID',
      'unknown type',
    ],
    [
      'a type that every object has',
      ({ image }) => void image(undefined, { type: 'constructor' }),
      'IMAGE_INVALID',
      'unknown type',
    ],
    [
      'more diff ids than layers',
      ({ putConfig, putManifest, index, digestOf }) => {
        const id = digestOf(Buffer.alloc(0))
        index([putManifest(putConfig([id, id]), [])])
      },
      'IMAGE_INVALID',
      'not the same number of layers',
    ],
    [
      'more layers than can be mounted',
      ({ image, putManifest, index }) => {
        const { config, layer } = image()
        index([
          putManifest(
            config,
            Array.from({ length: 501 }, () => layer),
          ),
        ])
      },
      'IMAGE_INVALID',
      'more than 500',
    ],
    [
      'an artifact that is no file system',
      ({ image, putManifest, index }) => {
        const { config, layer } = image()
        index([putManifest({ ...config, mediaType: 'application/vnd.oci.empty.v1+json' }, [layer])])
      },
      'IMAGE_INVALID',
      'no image of a file system',
    ],
    [
      'an image for another system',
      ({ putConfig, putManifest, index }) => index([putManifest(putConfig([], { os: 'windows' }), [])]),
      'IMAGE_INVALID',
      'it is for windows',
    ],
    [
      'an index in an index in an index …',
      ({ image, put, index }) => {
        let inner: Blob = image().manifest
        for (let depth = 0; depth < 8; depth++) {
          inner = put(`${OCI}.index.v1+json`, { schemaVersion: 2, manifests: [inner] })
        }
        index([inner])
      },
      'IMAGE_INVALID',
      'without end',
    ],
    ['names that lead out', ({ image }) => void image(tar({ '../../../escaped': 'x' })), 'ENTRY_REFUSED', 'escaped'],
    [
      'a bomb behind the end of its archive',
      ({ image }) => {
        const archive = Buffer.concat([tar({ f: 'x' }), Buffer.alloc(300 << 20)])
        image(archive, { type: `${OCI}.layer.v1.tar+zstd`, compressed: zstdCompressSync(archive) })
      },
      'LIMIT_EXCEEDED',
      'ratio',
    ],
  ]

  test.each(WRONG)('%s is refused, and nothing is left', async (_, make, code, message) => {
    const made = layout()
    made.image()
    make(made)
    await expect(made.read()).rejects.toMatchObject({ code, message: expect.stringContaining(message) })
    expect(made.left()).toEqual([])
    expect(existsSync(`${made.path}/../escaped`)).toBe(false)
  })

  test('several images are told apart by name and platform', async () => {
    const { image, put, index, read, host } = layout()
    const { manifest } = image()
    const named = (name: string, blob: Blob = manifest) => ({
      ...blob,
      annotations: { 'org.opencontainers.image.ref.name': name },
    })
    index([named('a'), named('b')])
    await expect(read()).rejects.toMatchObject({
      code: 'IMAGE_NOT_FOUND',
      message: expect.stringContaining('it has a, b'),
    })
    const platforms = ['amd64', 'arm64', 's390x'].map((architecture) => ({
      ...manifest,
      platform: { os: 'linux', architecture },
    }))
    index([named('many', put(`${OCI}.index.v1+json`, { schemaVersion: 2, manifests: platforms })), named('b')])
    const request = { layout: host('image'), namespace } as const
    await importImage({ ...request, ref: 'many', platform: 'linux/s390x', to: host('one') })
    await importImage({ ...request, ref: 'b', to: host('two') })
    await expect(
      importImage({ ...request, ref: 'many', platform: 'linux/riscv64', to: host('three') }),
    ).rejects.toMatchObject({ code: 'IMAGE_NOT_FOUND' })
  })

  test('a directory that is there already is left alone', async () => {
    const { image, read, path } = layout()
    image()
    mkdirSync(`${path}/to`)
    await expect(read()).rejects.toMatchObject({ code: 'OUTPUT_EXISTS' })
  })

  test('an export writes through no symlink in the layout', async () => {
    const { image, root, path, host } = layout()
    image()
    mkdirSync(`${path}/victim/sha256`, { recursive: true })
    rmSync(`${root}/blobs`, { recursive: true })
    symlinkSync('../victim', `${root}/blobs`)
    mkdirSync(`${path}/layer`)
    await expect(exportImage({ layers: [host('layer')], layout: host('image'), namespace })).rejects.toMatchObject({
      code: 'IMAGE_INVALID',
    })
    expect(readdirSync(`${path}/victim/sha256`)).toEqual([])
  })

  test('an export that fails leaves the images of a layout as they were', async () => {
    const { image, root, path, host } = layout()
    image()
    const before = execFileSync('sh', ['-c', 'find . -type f | sort | xargs sha256sum'], {
      cwd: root,
      encoding: 'utf8',
    })
    mkdirSync(`${path}/layer`)
    execFileSync('touch', [`${path}/layer/.wh.x`])
    await expect(exportImage({ layers: [host('layer')], layout: host('image'), namespace })).rejects.toMatchObject({
      code: 'NOT_EXPRESSIBLE',
    })
    expect(execFileSync('sh', ['-c', 'find . -type f | sort | xargs sha256sum'], { cwd: root, encoding: 'utf8' })).toBe(
      before,
    )
  })
})
