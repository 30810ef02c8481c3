import { allocate, type Memory } from '@lsync/posix'
import koffi from 'koffi'
import type { CipherKey, Engine } from './engine.ts'
import { NONCE_BYTES, writeNonce } from './nonce.ts'

/** Results and arguments: `i` int, `l` signed 64 bits, `p` an address or size, `s` a C string, `v` nothing. */
const SIGNATURES = {
  EVP_CIPHER_fetch: ['p', 'psp'],
  EVP_CIPHER_free: ['v', 'p'],
  EVP_CIPHER_CTX_new: ['p', ''],
  EVP_CIPHER_CTX_free: ['v', 'p'],
  EVP_EncryptInit_ex2: ['i', 'ppppp'],
  EVP_EncryptUpdate: ['i', 'ppppi'],
  EVP_MAC_fetch: ['p', 'psp'],
  EVP_MAC_free: ['v', 'p'],
  EVP_MAC_CTX_new: ['p', 'p'],
  EVP_MAC_CTX_free: ['v', 'p'],
  EVP_MAC_init: ['i', 'pppp'],
  EVP_MAC_update: ['i', 'ppp'],
  EVP_MAC_final: ['i', 'pppp'],
  EVP_MD_fetch: ['p', 'psp'],
  EVP_MD_free: ['v', 'p'],
  EVP_Digest: ['i', 'pppppp'],
  ZSTD_createCCtx: ['p', ''],
  ZSTD_freeCCtx: ['l', 'p'],
  ZSTD_createDCtx: ['p', ''],
  ZSTD_freeDCtx: ['l', 'p'],
  ZSTD_compressCCtx: ['l', 'pppppi'],
  ZSTD_decompressDCtx: ['l', 'ppppp'],
} as const

const TYPES = { i: 'int', l: 'int64_t', p: 'uint64_t', s: 'str', v: 'void' } as const

type Library = Readonly<Record<keyof typeof SIGNATURES, (...args: (number | string)[]) => number>>

// OpenSSL and zstd are part of the Node binary, which exports their symbols.
function loadLibrary(): Library | undefined {
  try {
    const program = koffi.load(null)
    const functions = Object.entries(SIGNATURES).map(([name, [result, args]]) => [
      name,
      program.func(
        name,
        TYPES[result],
        [...args].map((letter) => TYPES[letter as keyof typeof TYPES]),
      ),
    ])
    return Object.fromEntries(functions)
  } catch {
    // A Node that was built against shared libraries, or hides its symbols.
    return undefined
  }
}

const library = loadLibrary()

/** The same level as the format's other writers use by default. */
export const ZSTD_LEVEL = 3

// In `scratch`: the Poly1305 key of one message (r, then AES-128 of the nonce), a computed MAC, and lengths written back.
const POLY_KEY = 0
const POLY_S = 16
const COMPUTED = 32
const LENGTH_OUT = 48
const CIPHER_KEY = 64
const MAC_KEY = 96
const SCRATCH_BYTES = 128

/** OpenSSL and zstd by address, with contexts that live as long as the engine: no allocation in a call. */
export class NativeEngine implements Engine {
  readonly form = 'native'
  readonly #library: Library
  readonly #scratch = allocate(SCRATCH_BYTES)
  readonly #cipher: number
  readonly #cipherContext: number
  readonly #block: number
  readonly #blockContext: number
  readonly #mac: number
  readonly #macContext: number
  readonly #digest: number
  readonly #compressor: number
  readonly #decompressor: number

  static get isAvailable(): boolean {
    return library !== undefined
  }

  constructor(key: CipherKey) {
    if (library === undefined) throw new Error('this Node exports no OpenSSL and zstd')
    this.#library = library
    const { buffer, address } = this.#scratch
    key.macR.copy(buffer, POLY_KEY)
    key.encrypt.copy(buffer, CIPHER_KEY)
    key.macK.copy(buffer, MAC_KEY)
    this.#cipher = library.EVP_CIPHER_fetch(0, 'AES-256-CTR', 0)
    this.#cipherContext = library.EVP_CIPHER_CTX_new()
    this.#block = library.EVP_CIPHER_fetch(0, 'AES-128-ECB', 0)
    this.#blockContext = library.EVP_CIPHER_CTX_new()
    this.#mac = library.EVP_MAC_fetch(0, 'POLY1305', 0)
    this.#macContext = library.EVP_MAC_CTX_new(this.#mac)
    this.#digest = library.EVP_MD_fetch(0, 'SHA256', 0)
    this.#compressor = library.ZSTD_createCCtx()
    this.#decompressor = library.ZSTD_createDCtx()
    const iv = address + COMPUTED
    done(library.EVP_EncryptInit_ex2(this.#cipherContext, this.#cipher, address + CIPHER_KEY, iv, 0))
    done(library.EVP_EncryptInit_ex2(this.#blockContext, this.#block, address + MAC_KEY, 0, 0))
  }

  hash(from: Memory, at: number, length: number, to: Memory, toAt: number): void {
    within(from, at, length)
    within(to, toAt, 32)
    done(this.#library.EVP_Digest(from.address + at, length, to.address + toAt, 0, this.#digest, 0))
  }

  compress(from: Memory, at: number, length: number, to: Memory, toAt: number): number {
    within(from, at, length)
    const room = to.buffer.length - toAt
    const { address } = from
    const size = this.#library.ZSTD_compressCCtx(
      this.#compressor,
      to.address + toAt,
      room,
      address + at,
      length,
      ZSTD_LEVEL,
    )
    // Errors are small negative numbers.
    if (size < 0) throw new RangeError('the target is too small for what zstd makes')
    return size
  }

  decompress(from: Memory, at: number, length: number, to: Memory, toAt: number, capacity: number): number | undefined {
    within(from, at, length)
    within(to, toAt, capacity)
    const target = to.address + toAt
    const size = this.#library.ZSTD_decompressDCtx(this.#decompressor, target, capacity, from.address + at, length)
    return size < 0 ? undefined : size
  }

  seal(from: Memory, at: number, length: number, to: Memory, toAt: number): void {
    within(from, at, length)
    within(to, toAt, length + 32)
    writeNonce(to.buffer, toAt)
    const text = toAt + NONCE_BYTES
    this.#encrypt(to.address + toAt, from.address + at, length, to.address + text)
    this.#authenticate(to.address + toAt, to.address + text, length, to.address + text + length)
  }

  open(from: Memory, at: number, length: number, to: Memory, toAt: number): boolean {
    const textLength = length - 32
    if (textLength < 0) return false
    within(from, at, length)
    within(to, toAt, textLength)
    const text = at + NONCE_BYTES
    const { buffer, address } = this.#scratch
    this.#authenticate(from.address + at, from.address + text, textLength, address + COMPUTED)
    // All of it is compared, whatever differs first, so that the time tells nothing.
    let difference = 0
    const stored = text + textLength
    for (let i = 0; i < 16; i++) {
      difference |= (buffer[COMPUTED + i] as number) ^ (from.buffer[stored + i] as number)
    }
    if (difference !== 0) return false
    this.#encrypt(from.address + at, from.address + text, textLength, to.address + toAt)
    return true
  }

  close(): void {
    const library = this.#library
    library.EVP_CIPHER_CTX_free(this.#cipherContext)
    library.EVP_CIPHER_CTX_free(this.#blockContext)
    library.EVP_MAC_CTX_free(this.#macContext)
    library.EVP_CIPHER_free(this.#cipher)
    library.EVP_CIPHER_free(this.#block)
    library.EVP_MAC_free(this.#mac)
    library.EVP_MD_free(this.#digest)
    library.ZSTD_freeCCtx(this.#compressor)
    library.ZSTD_freeDCtx(this.#decompressor)
    this.#scratch.buffer.fill(0)
  }

  // In counter mode decrypting is encrypting.
  #encrypt(iv: number, from: number, length: number, to: number): void {
    const library = this.#library
    const lengthOut = this.#scratch.address + LENGTH_OUT
    done(library.EVP_EncryptInit_ex2(this.#cipherContext, 0, 0, iv, 0))
    if (length > 0) done(library.EVP_EncryptUpdate(this.#cipherContext, to, lengthOut, from, length))
  }

  #authenticate(nonce: number, text: number, length: number, to: number): void {
    const library = this.#library
    const { address } = this.#scratch
    done(library.EVP_EncryptUpdate(this.#blockContext, address + POLY_S, address + LENGTH_OUT, nonce, 16))
    done(library.EVP_MAC_init(this.#macContext, address + POLY_KEY, 32, 0))
    if (length > 0) done(library.EVP_MAC_update(this.#macContext, text, length))
    done(library.EVP_MAC_final(this.#macContext, to, address + LENGTH_OUT, 16))
  }
}

function done(result: number): void {
  if (result !== 1) throw new Error('OpenSSL refused a call')
}

function within(memory: Memory, at: number, length: number): void {
  // `!(…)` so that NaN is refused, too: these become addresses.
  if (!(at >= 0 && length >= 0 && at + length <= memory.buffer.length)) {
    throw new RangeError('beyond the end of the memory')
  }
}
