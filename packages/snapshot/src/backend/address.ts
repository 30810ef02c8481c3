import { type HostPath, hostPath } from '@lsync/posix'
import type { Backend } from './backend.ts'
import { RepositoryAddressError } from './errors.ts'
import { LocalBackend } from './local.ts'
import { RestBackend } from './rest.ts'
import { S3Backend } from './s3.ts'

/** What an address names: `rest:…`, `s3:…`, or a path, which `local:` may stand before. */
export type RepositoryAddress =
  | { readonly kind: 'local'; readonly path: HostPath }
  | { readonly kind: 'rest' | 's3'; readonly address: string }

/**
 * Reads the address of a repository.
 * @throws {RepositoryAddressError} when it is of a kind that there is no backend for
 */
export function parseRepositoryAddress(text: string): RepositoryAddress {
  const [, scheme, rest = ''] = /^(rest|s3|local):(.*)$/s.exec(text) ?? []
  if (scheme === 'rest' || scheme === 's3') return { kind: scheme, address: rest }
  if (scheme === undefined && /^[a-z][a-z0-9+]*:/.test(text)) {
    throw new RepositoryAddressError(text, 'there is no backend of this kind')
  }
  const path = scheme === 'local' ? rest : text
  if (path === '') throw new RepositoryAddressError(text, 'it is empty')
  return { kind: 'local', path: hostPath(path) }
}

/** The backend of an address. Nothing is read or opened yet. */
export function backendOf(address: RepositoryAddress): Backend {
  switch (address.kind) {
    case 'local':
      return new LocalBackend(address.path)
    case 'rest':
      return new RestBackend(address.address)
    case 's3':
      return new S3Backend(address.address)
  }
}
