import {
  type ConvertProgress,
  exportLayer,
  type LayerForm,
  type LayerReader,
  merge,
  type Namespace,
  RequestInvalidError,
  removeTree,
} from '@lsync/overlay-merge'
import { type ByteString, close, type HostPath, makeDirectory, openRoot, randomHex } from '@lsync/posix'
import {
  CONFIG_TYPE,
  type Descriptor,
  hostPlatform,
  type ImageConfig,
  LAYER_TYPE,
  layerTypeOf,
  MANIFEST_TYPE,
} from './image.ts'
import { type Image, type ImageChoice, ImageLayout } from './layout.ts'

/** How an image is run. Fields that are given replace those of the base. Source: OCI image specification, "config". */
export interface RunConfig {
  readonly Entrypoint?: readonly string[]
  readonly Cmd?: readonly string[]
  /** `NAME=value`; names of the base that are not given stay. */
  readonly Env?: readonly string[]
  readonly WorkingDir?: string
  readonly User?: string
  readonly Labels?: Readonly<Record<string, string>>
  readonly [field: string]: unknown
}

export interface ImageExportRequest {
  /** Top first. More than one are folded into one before. */
  readonly layers: readonly HostPath[]
  /** What has the items of the layer, in the place of `layers`. */
  readonly reader?: LayerReader
  /** What a single layer is. Default: a kernel layer in `namespace`. */
  readonly form?: LayerForm
  /** Whose marks count. Default `trusted`. */
  readonly namespace?: Namespace
  /** The image layout; made where it is not there. Its other images stay. */
  readonly layout: HostPath
  /** The image's name in the layout. Default `latest`. */
  readonly ref?: string
  /** The image that the layers lie on. Its layers, config and history are kept. */
  readonly base?: ImageChoice & { readonly layout?: HostPath }
  readonly run?: RunConfig
  /** Default: the base's, or this machine's. */
  readonly architecture?: string
  /** RFC 3339. Without it the image tells no time, so that the same layers make the same image. */
  readonly created?: string
  readonly author?: string
  readonly comment?: string
  /** Default `gzip`, which everybody reads. */
  readonly compression?: 'none' | 'gzip' | 'zstd'
  readonly level?: number
  readonly lossy?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: ConvertProgress) => void
}

export interface ImageExportReport {
  /** Of the manifest: what registries call the image. */
  readonly digest: string
  readonly ref: string
  /** The layer that was made. */
  readonly layer: { readonly digest: string; readonly diffId: string; readonly bytes: number; readonly entries: number }
  /** Layers of the image, this one included. */
  readonly layers: number
  readonly losses: readonly { readonly path: ByteString; readonly what: string }[]
}

/**
 * Adds an image to a layout: one new layer, on those of a base if there is one. The same layers, options and versions of
 * lsync and Node give the same bytes. The image appears in the index when all of it is durable.
 * @throws {LsyncError} IMAGE_INVALID, IMAGE_NOT_FOUND, BLOB_DAMAGED, LAYOUT_BUSY, and what `merge` and `exportLayer` throw
 */
export async function exportImage(request: ImageExportRequest): Promise<ImageExportReport> {
  const { layers, signal, ref = 'latest' } = request
  signal?.throwIfAborted()
  if (layers.length === 0 && request.reader === undefined)
    throw new RequestInvalidError('an image is made of a layer at least', 'name a layer')
  const layout = ImageLayout.create(request.layout)
  try {
    const base = await takeBase(request, layout)
    const made = await withOneLayer(request, layout, (from, form) => exportInto(request, layout, from, form))
    const config = layout.writeDocument(CONFIG_TYPE, configOf(request, base?.config, made.layer.diffId))
    const manifest = layout.writeDocument(MANIFEST_TYPE, {
      schemaVersion: 2,
      mediaType: MANIFEST_TYPE,
      config,
      layers: [...(base?.manifest.layers.map(asOci) ?? []), made.descriptor],
      ...(base?.manifest.annotations === undefined ? {} : { annotations: base.manifest.annotations }),
    })
    layout.addToIndex(manifest, ref)
    const count = (base?.manifest.layers.length ?? 0) + 1
    return { digest: manifest.digest, ref, layer: made.layer, layers: count, losses: made.losses }
  } finally {
    layout.close()
  }
}

/** Finds the base, and brings its layers into the layout. */
async function takeBase({ base, signal }: ImageExportRequest, layout: ImageLayout): Promise<Image | undefined> {
  if (base === undefined) return undefined
  const source = base.layout === undefined ? layout : ImageLayout.open(base.layout)
  try {
    const image = source.find(base)
    for (const descriptor of image.manifest.layers) {
      if (source !== layout) await layout.copyBlob(source, descriptor, signal)
    }
    return image
  } finally {
    if (source !== layout) source.close()
  }
}

/** Runs `use` on the one layer that all layers are: the only one, or what they make together. */
async function withOneLayer<T>(
  request: ImageExportRequest,
  layout: ImageLayout,
  use: (from: HostPath | LayerReader, form: LayerForm | undefined) => Promise<T>,
): Promise<T> {
  const { namespace, base, signal } = request
  if (request.reader !== undefined) return use(request.reader, request.form)
  const [upper, ...lowers] = request.layers as [HostPath, ...HostPath[]]
  if (lowers.length === 0) return use(upper, request.form)
  const name = `.lsync-export-${randomHex(8)}` as ByteString
  const layoutFd = openRoot(layout.path)
  try {
    makeDirectory(layoutFd, name, 0o700)
    const output = `${layout.path}/${name}/layer` as HostPath
    // On a base it stays a layer, whose whiteouts hide what lies below; otherwise it is what the stack shows.
    await merge({
      mode: base === undefined ? 'output' : 'delta',
      upper,
      lowers,
      output,
      ...(namespace === undefined ? {} : { namespace }),
      ...(signal === undefined ? {} : { signal }),
    })
    return await use(output, undefined)
  } finally {
    removeTree(layoutFd, name)
    close(layoutFd)
  }
}

async function exportInto(
  request: ImageExportRequest,
  layout: ImageLayout,
  from: HostPath | LayerReader,
  form?: LayerForm,
) {
  const { namespace, compression = 'gzip', level, lossy, signal, onProgress } = request
  const { name, path } = layout.temporaryBlob()
  try {
    const report = await exportLayer({
      from,
      form: 'oci',
      to: path,
      compression,
      ...(form === undefined ? {} : { fromForm: form }),
      ...(namespace === undefined ? {} : { namespace }),
      ...(level === undefined ? {} : { level }),
      ...(lossy === undefined ? {} : { lossy }),
      ...(signal === undefined ? {} : { signal }),
      ...(onProgress === undefined ? {} : { onProgress }),
    })
    const { archive, entries, losses } = report
    if (archive === undefined) throw new Error('an archive without a digest')
    layout.publishBlob(name, archive.digest)
    const mediaType = compression === 'none' ? LAYER_TYPE : `${LAYER_TYPE}+${compression}`
    const descriptor: Descriptor = { mediaType, digest: archive.digest, size: archive.bytes }
    const layer = { digest: archive.digest, diffId: archive.diffId, bytes: archive.bytes, entries }
    return { descriptor, layer, losses }
  } catch (error) {
    layout.discardBlob(name)
    throw error
  }
}

function asOci({ mediaType, digest, size, annotations }: Descriptor): Descriptor {
  const type = layerTypeOf(mediaType) ?? mediaType
  return { mediaType: type, digest, size, ...(annotations === undefined ? {} : { annotations }) }
}

/** The base's config with one more layer in its root file system and its history. */
function configOf(request: ImageExportRequest, base: ImageConfig | undefined, diffId: string): ImageConfig {
  const { created, author, comment, run } = request
  const host = hostPlatform()
  const entry = {
    ...(created === undefined ? {} : { created }),
    created_by: 'lsync image export',
    ...(author === undefined ? {} : { author }),
    ...(comment === undefined ? {} : { comment }),
  }
  // A history tells of every layer or is not there; the base's layers get entries that tell nothing.
  const history = base?.history ?? base?.rootfs.diff_ids.map(() => ({})) ?? []
  const { created: _, ...kept } = (base ?? {}) as Partial<ImageConfig> & { created?: unknown }
  return {
    ...kept,
    ...(created === undefined ? {} : { created }),
    ...(author === undefined ? {} : { author }),
    architecture: request.architecture ?? base?.architecture ?? host.architecture,
    os: base?.os ?? host.os,
    config: mergedRun(base?.config ?? {}, run ?? {}),
    rootfs: { type: 'layers', diff_ids: [...(base?.rootfs.diff_ids ?? []), diffId] },
    history: [...history, entry],
  }
}

function mergedRun(base: Readonly<Record<string, unknown>>, run: RunConfig): Readonly<Record<string, unknown>> {
  const names = new Set(run.Env?.map((variable) => variable.split('=')[0]))
  const inherited = Array.isArray(base['Env'])
    ? base['Env'].filter((text) => !names.has(String(text).split('=')[0]))
    : []
  // A command of the base is an argument of the base's entry point.
  const { Cmd: baseCmd, ...others } = base
  const Cmd = run.Cmd ?? (run.Entrypoint === undefined ? baseCmd : undefined)
  const env = run.Env === undefined ? {} : { Env: [...inherited, ...run.Env] }
  const labels =
    run.Labels === undefined ? {} : { Labels: { ...(base['Labels'] as object | undefined), ...run.Labels } }
  return { ...others, ...run, ...(Cmd === undefined ? {} : { Cmd }), ...env, ...labels }
}
