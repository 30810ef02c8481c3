import { generateKeyPairSync, KeyObject } from 'node:crypto'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import ssh2 from 'ssh2'
import { expect, test } from 'vitest'
import { passKeysAsObjects } from './packet-keys.ts'

test('packets are encrypted and decrypted with key objects, and go through', async () => {
  const { privateKey } = generateKeyPairSync('rsa', {
    modulusLength: 2048,
    publicKeyEncoding: { type: 'spki', format: 'pem' },
    privateKeyEncoding: { type: 'pkcs1', format: 'pem' },
  })
  const server = new ssh2.Server({ hostKeys: [privateKey] }, (peer) => {
    peer.on('error', () => undefined)
    peer.on('authentication', (context) => context.accept())
    peer.on('session', (accept) => accept().on('exec', (run) => run().end('what it said')))
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const client = new ssh2.Client()
  passKeysAsObjects(client)
  const { port } = server.address() as AddressInfo
  client.connect({
    ...{ host: '127.0.0.1', port, username: 'any', hostVerifier: () => true },
    algorithms: { cipher: ['aes128-gcm@openssh.com'] },
  })
  await once(client, 'ready')
  const { _protocol } = client as unknown as {
    _protocol: { _cipher: { _encKey: unknown }; _decipher: { _decipherKey: unknown } }
  }
  expect(_protocol._cipher._encKey).toBeInstanceOf(KeyObject)
  expect(_protocol._decipher._decipherKey).toBeInstanceOf(KeyObject)
  const said = await new Promise<string>((resolve, reject) => {
    client.exec('any', (error, channel) => {
      if (error) reject(error)
      else channel.setEncoding('utf8').once('data', resolve)
    })
  })
  expect(said).toBe('what it said')
  client.end()
  server.close()
})
