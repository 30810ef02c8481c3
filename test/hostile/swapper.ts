// Plays the person who is root in a container: swaps a directory for a symlink to `outside` and back, as fast as it can.
import { mkdirSync, renameSync, symlinkSync } from 'node:fs'

const [parent, name, outside] = process.argv.slice(2) as [string, string, string]
const aside = `${parent}/.aside-${name}`
const link = `${parent}/.link-${name}`
symlinkSync(outside, link)
process.send?.('swapping')
for (;;) {
  try {
    renameSync(`${parent}/${name}`, aside)
    renameSync(link, `${parent}/${name}`)
    renameSync(`${parent}/${name}`, link)
    renameSync(aside, `${parent}/${name}`)
  } catch {
    // The merge took one of them: make both again and go on.
    try {
      mkdirSync(`${parent}/${name}`)
    } catch {}
    try {
      symlinkSync(outside, link)
    } catch {}
  }
}
