import { fileURLToPath } from 'node:url'
import { defineConfig, type Plugin } from 'rolldown'

// What takes milliseconds to load, and most runs never use.
const LATE = ['node:child_process', 'node:crypto']

/**
 * Takes Node's own modules without `import`, which runs every lazy getter that they have: `node:crypto` and `node:fs`
 * cost 10 ms so, and 0.05 ms without. Those of `LATE` are loaded by the first call of one of their functions.
 */
const builtins: Plugin = {
  name: 'builtins',
  renderChunk: (code) =>
    code.replaceAll(
      /^import (?:(?:\* as )?([\w$]+))?(?:, )?(?:\{ (.+?) \})? from ["'](node:[\w/]+)["'];$/gm,
      (_, whole: string | undefined, names: string | undefined, module: string) => {
        const source = `globalThis.process.getBuiltinModule("${module}")`
        const isLate = LATE.includes(module)
        const declarations: string[] = []
        const late = (name: string) => `(...args) => ${source}.${name}(...args)`
        if (whole !== undefined) declarations.push(`${whole} = ${isLate ? lateModule(code, whole, late) : source}`)
        for (const item of names?.split(', ') ?? []) {
          const [name = '', local = name] = item.split(' as ')
          declarations.push(`${local} = ${isLate ? late(name) : `${source}.${name}`}`)
        }
        return `const ${declarations.join(', ')};`
      },
    ),
}

function lateModule(code: string, local: string, late: (name: string) => string): string {
  const used = new Set(
    [...code.matchAll(/([\w$]+)\.(\w+)\(/g)].filter(([, of]) => of === local).map(([, , name]) => name),
  )
  return `{ ${[...used].map((name) => `${name}: ${late(name as string)}`).join(', ')} }`
}

/** Workers lie beside what starts them, and each turns on the cache for itself before its code is loaded. */
const workers: Plugin = {
  name: 'workers',
  transform: (code) =>
    code.replaceAll(/new URL\('\.\/([\w-]*worker)\.ts', import\.meta\.url\)/g, "new URL('./$1.js', import.meta.url)"),
  resolveId: (id) => (id.startsWith('cached:') ? `\0${id}` : undefined),
  load(id) {
    if (!id.startsWith('\0cached:')) return undefined
    const path = (relative: string) => JSON.stringify(fileURLToPath(new URL(relative, import.meta.url)))
    return `import { useCodeCache } from ${path('src/code-cache.ts')}
useCodeCache()
await import(${path(id.slice('\0cached:'.length))})`
  },
}

/** koffi's JavaScript is bundled; its native part is found where koffi would find it. */
const koffi: Plugin = {
  name: 'koffi',
  transform(code, id) {
    if (!id.includes('/node_modules/koffi/')) return undefined
    const main = 'createRequire(import.meta.url).resolve("koffi")'
    return code
      .replaceAll('import.meta.dirname', `${main}.replace(/[^/]*$/, "src/koffi")`)
      .replaceAll('createRequire(import.meta.url);', `createRequire(${main});`)
  },
}

/** ssh2 names a program for Windows by where its own file is, as soon as it is loaded. A bundle has no such place. */
const ssh2: Plugin = {
  name: 'ssh2',
  transform: (code, id) => (id.includes('/node_modules/ssh2/') ? code.replaceAll('__dirname', '"."') : undefined),
}

// What merging needs, in the command and in its workers.
const ENGINE = [
  /packages\/posix\/src\//,
  /packages\/overlay-merge\/src\/(model\/|encodings\/inode|merge|plan|pool|work\b|journal|apply|effects|executing|clone)/,
  /packages\/overlay-merge\/src\/(compose|index-aliases|multimap|problems|recover|resolve|safety|scan|stack|stage)/,
  /node_modules\/(koffi|xxhash-wasm)\//,
]

// But for workers, they do nothing when they are loaded that others than their importers notice.
const LIBRARIES = /\/packages\/(?!cli\/)[\w-]+\/src\/(?!.*worker\.ts$)/

/**
 * A few files: what the common commands need is one, and what others add comes with them. Sixty modules take twice as
 * long to find and link (`bench merge`, row start-up), in every worker thread again.
 */
export default defineConfig({
  input: {
    main: 'src/main.ts',
    worker: 'cached:../overlay-merge/src/worker.ts',
    'compare-worker': 'cached:../overlay-merge/src/compare-worker.ts',
    'poll-worker': 'cached:../sync/src/source/poll-worker.ts',
    'serve-worker': 'cached:../sync/src/serve/serve-worker.ts',
    'sync-worker': 'cached:../sync/src/sync-worker.ts',
    'snapshot-worker': 'cached:../snapshot/src/snapshot-worker.ts',
    'restore-worker': 'cached:../snapshot/src/restore-worker.ts',
    'store-worker': 'cached:../snapshot/src/store-worker.ts',
    'check-worker': 'cached:../snapshot/src/check-worker.ts',
  },
  platform: 'node',
  // lmdb finds its native part beside itself. Those of ssh2 are not built; it goes without them.
  external: [/^node:/, 'lmdb', /\.node$/],
  treeshake: {
    moduleSideEffects: [
      // Whoever uses nothing of lmdb does not load it,
      { external: true, sideEffects: false },
      // and a merge not what compares and converts, a worker of a sync not what reads tar files.
      { test: LIBRARIES, sideEffects: false },
    ],
  },
  plugins: [builtins, workers, koffi, ssh2],
  output: {
    dir: 'dist',
    format: 'esm',
    cleanDir: true,
    entryFileNames: '[name].js',
    chunkFileNames: '[name]-[hash].js',
    codeSplitting: { groups: [{ name: 'engine', test: (id) => ENGINE.some((part) => part.test(id)) }] },
  },
})
