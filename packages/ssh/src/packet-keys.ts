import { createSecretKey } from 'node:crypto'
import type { Client } from 'ssh2'

/** What ssh2 1.17 keeps of AES-GCM: it makes a cipher from it for each packet. */
interface Protocol {
  readonly _cipher?: { _encKey?: unknown }
  readonly _decipher?: { _decipherKey?: unknown }
}

/**
 * Has ssh2 hand its keys to node:crypto as key objects. Node 24 finds out by an exception, with a stack trace, that bytes are
 * none: 10 µs for each packet, half of what its encryption takes. Where ssh2 keeps its keys elsewhere nothing happens.
 */
export function passKeysAsObjects(client: Client): void {
  // Each exchange of keys makes new ones.
  client.on('handshake', () => {
    const { _cipher, _decipher } = (client as unknown as { _protocol: Protocol })._protocol
    if (Buffer.isBuffer(_cipher?._encKey)) _cipher._encKey = createSecretKey(_cipher._encKey)
    if (Buffer.isBuffer(_decipher?._decipherKey)) _decipher._decipherKey = createSecretKey(_decipher._decipherKey)
  })
}
