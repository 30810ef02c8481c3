/** Bytes as one word that bash and zsh read back as those bytes: as they are, in quotes, or as `$'\xff'`. */
export function shellWord(bytes: string): string {
  if (/^[\w%+,./:=@-]+$/.test(bytes)) return bytes
  if (/^[ -~]*$/.test(bytes)) return `'${bytes.replaceAll("'", "'\\''")}'`
  const escaped = bytes.replace(/[^ -~]|[\\']/g, (byte) =>
    byte === '\\' || byte === "'" ? `\\${byte}` : `\\x${byte.charCodeAt(0).toString(16).padStart(2, '0')}`,
  )
  return `$'${escaped}'`
}
