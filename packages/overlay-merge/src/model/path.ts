import type { ByteString } from '@lsync/posix'

/** A path relative to a layer root: components joined by `/`, no leading slash; `''` is the root itself. Bytes. */
export type EntryPath = ByteString & { readonly entry: true }

/** One component of an `EntryPath`: not empty, no slash. */
export type Name = ByteString & { readonly component: true }

export const ROOT = '' as EntryPath

/** The path of `name` in the directory `directory`. */
export function join(directory: EntryPath, name: ByteString): EntryPath {
  return (directory === '' ? name : `${directory}/${name}`) as EntryPath
}

/** The directory that holds `path`, and its last component. The root has neither. */
export function split(path: EntryPath): { parent: EntryPath; name: Name } {
  const slash = path.lastIndexOf('/')
  return slash < 0
    ? { parent: ROOT, name: path as string as Name }
    : { parent: path.slice(0, slash) as EntryPath, name: path.slice(slash + 1) as Name }
}

/** The components of a path, top first; none for the root. */
export function components(path: EntryPath): Name[] {
  return path === '' ? [] : (path.split('/') as Name[])
}

/** Whether `path` is `ancestor` or lies beneath it. */
export function isWithin(path: EntryPath, ancestor: EntryPath): boolean {
  return ancestor === '' || path === ancestor || path.startsWith(`${ancestor}/`)
}
