import { arch } from 'node:process'

// What image layouts say, read as if everybody were hostile.
// Source: OCI image specification 1.1 ("Image Layout", "Manifest", "Index", "Configuration").

/** A reference to a blob. */
export interface Descriptor {
  readonly mediaType: string
  /** `sha256:…` or `sha512:…` */
  readonly digest: string
  readonly size: number
  readonly annotations?: Readonly<Record<string, string>>
  readonly platform?: Platform
}

export interface Platform {
  readonly os: string
  readonly architecture: string
  readonly variant?: string
}

export interface Manifest {
  readonly config: Descriptor
  /** Bottom first. */
  readonly layers: readonly Descriptor[]
  readonly annotations?: Readonly<Record<string, string>>
}

/** An image's configuration. What lsync does not know stays as it is. */
export interface ImageConfig {
  readonly os: string
  readonly architecture: string
  readonly rootfs: { readonly type: 'layers'; readonly diff_ids: readonly string[] }
  readonly config?: Readonly<Record<string, unknown>>
  readonly history?: readonly Readonly<Record<string, unknown>>[]
  readonly [field: string]: unknown
}

export const INDEX_TYPE = 'application/vnd.oci.image.index.v1+json'
export const MANIFEST_TYPE = 'application/vnd.oci.image.manifest.v1+json'
export const CONFIG_TYPE = 'application/vnd.oci.image.config.v1+json'
export const LAYER_TYPE = 'application/vnd.oci.image.layer.v1.tar'
export const REF_NAME = 'org.opencontainers.image.ref.name'

const INDEX_TYPES = new Set([INDEX_TYPE, 'application/vnd.docker.distribution.manifest.list.v2+json'])
const MANIFEST_TYPES = new Set([MANIFEST_TYPE, 'application/vnd.docker.distribution.manifest.v2+json'])
const CONFIG_TYPES = new Set([CONFIG_TYPE, 'application/vnd.docker.container.image.v1+json'])
const LAYER_TYPES: Readonly<Record<string, string>> = {
  [LAYER_TYPE]: LAYER_TYPE,
  [`${LAYER_TYPE}+gzip`]: `${LAYER_TYPE}+gzip`,
  [`${LAYER_TYPE}+zstd`]: `${LAYER_TYPE}+zstd`,
  'application/vnd.oci.image.layer.nondistributable.v1.tar': LAYER_TYPE,
  'application/vnd.oci.image.layer.nondistributable.v1.tar+gzip': `${LAYER_TYPE}+gzip`,
  'application/vnd.oci.image.layer.nondistributable.v1.tar+zstd': `${LAYER_TYPE}+zstd`,
  'application/vnd.docker.image.rootfs.diff.tar': LAYER_TYPE,
  'application/vnd.docker.image.rootfs.diff.tar.gzip': `${LAYER_TYPE}+gzip`,
  'application/vnd.docker.image.rootfs.diff.tar.zstd': `${LAYER_TYPE}+zstd`,
  'application/vnd.docker.image.rootfs.foreign.diff.tar.gzip': `${LAYER_TYPE}+gzip`,
}
// overlayfs mounts 500 layers at most.
const MAX_LAYERS = 500
const MAX_MANIFESTS = 10_000

type Fields = Readonly<Record<string, unknown>>

/** What is wrong with a document, for the message. */
export class DocumentError extends Error {}

/** @throws {DocumentError} */
export function parseIndex(text: string): readonly Descriptor[] {
  const index = fieldsOf(json(text), 'the index')
  if (index['schemaVersion'] !== 2) throw new DocumentError('the index has another schema version than 2')
  return listOf(index['manifests'], 'the manifests of the index', MAX_MANIFESTS).map(descriptorOf)
}

/** @throws {DocumentError} */
export function parseManifest(text: string): Manifest {
  const manifest = fieldsOf(json(text), 'the manifest')
  if (manifest['schemaVersion'] !== 2) throw new DocumentError('the manifest has another schema version than 2')
  const config = descriptorOf(manifest['config'])
  if (!CONFIG_TYPES.has(config.mediaType))
    throw new DocumentError(`it is no image of a file system (${config.mediaType})`)
  const layers = listOf(manifest['layers'], 'the layers of the manifest', MAX_LAYERS).map(descriptorOf)
  const annotations = annotationsOf(manifest['annotations'])
  return { config, layers, ...(annotations === undefined ? {} : { annotations }) }
}

/** @throws {DocumentError} */
export function parseConfig(text: string): ImageConfig {
  const config = fieldsOf(json(text), 'the config')
  const rootfs = fieldsOf(config['rootfs'], 'the rootfs of the config')
  if (rootfs['type'] !== 'layers') throw new DocumentError('the rootfs of the config is not made of layers')
  for (const diffId of listOf(rootfs['diff_ids'], 'the diff ids of the config', MAX_LAYERS)) digestOf(diffId)
  platformOf(config)
  if (config['config'] !== undefined && config['config'] !== null) fieldsOf(config['config'], 'the inner config')
  if (config['history'] !== undefined && config['history'] !== null) {
    for (const entry of listOf(config['history'], 'the history', MAX_MANIFESTS))
      fieldsOf(entry, 'an entry of the history')
  }
  return config as unknown as ImageConfig
}

export function isIndexType(mediaType: string): boolean {
  return INDEX_TYPES.has(mediaType)
}

export function isManifestType(mediaType: string): boolean {
  return MANIFEST_TYPES.has(mediaType)
}

/** OCI's name for the type of a layer; `undefined` for what is none that lsync reads. */
export function layerTypeOf(mediaType: string): string | undefined {
  return Object.hasOwn(LAYER_TYPES, mediaType) ? LAYER_TYPES[mediaType] : undefined
}

/** The platform of this machine, as images name it. */
export function hostPlatform(): Platform {
  const names: Readonly<Record<string, string>> = { x64: 'amd64', ia32: '386' }
  return { os: 'linux', architecture: names[arch] ?? arch }
}

function json(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch (error) {
    throw new DocumentError('it is not JSON', { cause: error })
  }
}

function fieldsOf(value: unknown, what: string): Fields {
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw new DocumentError(`${what} is no object`)
  return value as Fields
}

function listOf(value: unknown, what: string, limit: number): readonly unknown[] {
  if (!Array.isArray(value)) throw new DocumentError(`${what} are no list`)
  if (value.length > limit) throw new DocumentError(`${what} are more than ${limit}`)
  return value
}

function descriptorOf(value: unknown): Descriptor {
  const fields = fieldsOf(value, 'a descriptor')
  const { mediaType, size, platform } = fields
  if (typeof mediaType !== 'string' || mediaType.length > 300) throw new DocumentError('a descriptor has no media type')
  if (typeof size !== 'number' || !Number.isSafeInteger(size) || size < 0) {
    throw new DocumentError('a descriptor has no size')
  }
  const annotations = annotationsOf(fields['annotations'])
  return {
    mediaType,
    digest: digestOf(fields['digest']),
    size,
    ...(annotations === undefined ? {} : { annotations }),
    ...(platform === undefined || platform === null ? {} : { platform: platformOf(fieldsOf(platform, 'a platform')) }),
  }
}

// It becomes a path, so nothing else than hexadecimal digits may be in it.
function digestOf(value: unknown): string {
  if (typeof value === 'string' && /^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$/.test(value)) return value
  throw new DocumentError('a digest is none of SHA-256 or SHA-512')
}

function platformOf({ os, architecture, variant }: Fields): Platform {
  const isName = (name: unknown) => typeof name === 'string' && name.length <= 100
  if (!isName(os) || !isName(architecture)) throw new DocumentError('a platform has no os and architecture')
  const known = { os: os as string, architecture: architecture as string }
  return typeof variant === 'string' && variant !== '' && isName(variant) ? { ...known, variant } : known
}

function annotationsOf(value: unknown): Readonly<Record<string, string>> | undefined {
  if (value === undefined || value === null) return undefined
  const fields = fieldsOf(value, 'the annotations')
  if (Object.values(fields).some((text) => typeof text !== 'string')) {
    throw new DocumentError('an annotation is no text')
  }
  return fields as Record<string, string>
}
