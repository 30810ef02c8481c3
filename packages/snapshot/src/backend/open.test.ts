import { describe, expect, test } from 'vitest'
import { openBackend } from './open.ts'
import { parseS3Address } from './s3.ts'
import { parseSftpAddress } from './sftp.ts'

describe('the address of a repository', () => {
  test.each([
    ['/srv/repository', '/srv/repository'],
    ['local:/srv/a:b', '/srv/a:b'],
    ['rest:http://host:8000/a', 'rest:http://host:8000/a/'],
    ['rest:https://me:secret@host/a/', 'rest:https://host/a/'],
    ['s3:https://host:9000/bucket/some//where/', 's3:https://host:9000/bucket/some/where/'],
    ['s3:s3.amazonaws.com/bucket', 's3:https://s3.amazonaws.com/bucket/'],
    ['s3://host/bucket/x', 's3:https://host/bucket/x/'],
    ['sftp:me@host:relative/path', 'sftp://me@host/relative/path'],
    ['sftp:host:/absolute', 'sftp://host//absolute'],
    ['sftp://me@[::1]:2222//srv/r', 'sftp://me@[::1]:2222//srv/r'],
  ])('%s is read', async (address, location) => {
    const backend = openBackend(address)
    expect(backend.location).toBe(location)
    await backend.close()
  })

  test.each([
    'relative/path',
    '',
    'local:relative',
    'swift:container:/path',
    'rest:host/path',
    'rest:ftp://host/path',
    'rest:',
    's3:https://host',
    's3:https://host/',
    's3:https://key:secret@host/bucket',
    'sftp:host',
    'sftp://host',
    'sftp://host/',
    'sftp://me:secret@host/x',
    'sftp://host:0/x',
    'sftp://host:99999/x',
    'sftp:-oProxyCommand=x:/y',
    'sftp:-l@host:/y',
    'sftp://host/%2',
    'sftp://host/a%00b',
  ])('%j is refused', (address) => {
    expect(() => openBackend(address)).toThrow(expect.objectContaining({ code: 'REPOSITORY_ADDRESS_INVALID' }))
  })

  test('a refusal shows no password', () => {
    const refused = () => openBackend('s3:https://key:secret@host/bucket')
    expect(refused).toThrow(expect.not.objectContaining({ message: expect.stringContaining('secret') }))
  })

  test('names of SFTP paths are bytes', () => {
    expect(parseSftpAddress('//host//a%ff/b').path).toBe('/a\xff/b')
    expect(parseSftpAddress('host:ä%20').path).toBe('\xc3\xa4%20')
  })

  test('a prefix ends with a slash or is none', () => {
    expect(parseS3Address('host/bucket')).toMatchObject({ bucket: 'bucket', prefix: '' })
    expect(parseS3Address('http://host/bucket/a/b')).toEqual({
      endpoint: 'http://host',
      bucket: 'bucket',
      prefix: 'a/b/',
    })
  })
})
