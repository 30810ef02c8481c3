/** Names of users and groups by number. */
export interface Accounts {
  readonly users: ReadonlyMap<number, string>
  readonly groups: ReadonlyMap<number, string>
}

/** The names in a file of the form of passwd(5) or group(5); the first line of a number counts. */
export function parseAccounts(text: string): Map<number, string> {
  const names = new Map<number, string>()
  for (const line of text.split('\n')) {
    const [name = '', , number = ''] = line.split(':')
    if (name !== '' && /^\d+$/.test(number) && !names.has(Number(number))) names.set(Number(number), name)
  }
  return names
}
