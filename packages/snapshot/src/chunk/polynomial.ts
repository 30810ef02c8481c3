import { randomBytes } from 'node:crypto'
import { LsyncError } from '@lsync/posix'

/** A polynomial over GF(2): bit n is the coefficient of x^n. */
export type Polynomial = bigint

/** The degree of the polynomials that cut content. Source: restic's design document, "Backups and Deduplication". */
export const DEGREE = 53

/** The highest power with a coefficient; -1 of zero. */
export function degreeOf(polynomial: Polynomial): number {
  return polynomial === 0n ? -1 : polynomial.toString(2).length - 1
}

/** The remainder of a division. */
export function remainderOf(dividend: Polynomial, divisor: Polynomial): Polynomial {
  const degree = degreeOf(divisor)
  let rest = dividend
  for (let at = degreeOf(rest); at >= degree; at = degreeOf(rest)) rest ^= divisor << BigInt(at - degree)
  return rest
}

function multiply(left: Polynomial, right: Polynomial, modulus: Polynomial): Polynomial {
  let product = 0n
  let factor = left
  for (let rest = right; rest > 0n; rest >>= 1n) {
    if ((rest & 1n) === 1n) product ^= factor
    factor = remainderOf(factor << 1n, modulus)
  }
  return product
}

function greatestCommonDivisor(left: Polynomial, right: Polynomial): Polynomial {
  let [a, b] = [left, right]
  while (b !== 0n) [a, b] = [b, remainderOf(a, b)]
  return a
}

/** Whether no two smaller polynomials multiply to this one (the test of Ben-Or). */
export function isIrreducible(polynomial: Polynomial): boolean {
  let power = 2n // x^(2^i)
  for (let i = 1; i <= degreeOf(polynomial) / 2; i++) {
    power = multiply(power, power, polynomial)
    if (greatestCommonDivisor(polynomial, power ^ 2n) !== 1n) return false
  }
  return degreeOf(polynomial) > 0
}

/** A random irreducible polynomial of degree 53: where content is cut is a secret of the repository. */
export function randomPolynomial(): Polynomial {
  for (;;) {
    const bits = randomBytes(8).readBigUInt64LE(0) & ((1n << BigInt(DEGREE)) - 1n)
    // Those that x or x+1 divides are most, and known at sight.
    const candidate = bits | (1n << BigInt(DEGREE)) | 1n
    if (isIrreducible(candidate)) return candidate
  }
}

/** A polynomial as a repository's config has it: hexadecimal. */
export function polynomialText(polynomial: Polynomial): string {
  return polynomial.toString(16)
}

/**
 * Reads a config's polynomial.
 * @throws {PolynomialInvalidError} when the chunker cannot work with it
 */
export function parsePolynomial(text: string): Polynomial {
  const polynomial = /^[0-9a-f]{1,16}$/.test(text) ? BigInt(`0x${text}`) : 0n
  if (degreeOf(polynomial) !== DEGREE || !isIrreducible(polynomial)) throw new PolynomialInvalidError(text)
  return polynomial
}

/** The polynomial of a repository's config cannot cut content. */
export class PolynomialInvalidError extends LsyncError {
  constructor(text: string) {
    super('POLYNOMIAL_INVALID', `the repository's chunker polynomial is not one: ${text.slice(0, 40)}`, {
      hint: 'bring back the file `config` from a copy of the repository',
    })
  }
}
