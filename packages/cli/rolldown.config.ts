import { defineConfig } from 'rolldown'

/**
 * One file for each thing that is loaded at a time. Sixty modules take twice as long to find and link as these do
 * (`bench merge`, row start-up), in every worker thread again.
 */
export default defineConfig({
  input: {
    main: 'src/main.ts',
    worker: '../overlay-merge/src/worker.ts',
    'compare-worker': '../overlay-merge/src/compare-worker.ts',
  },
  platform: 'node',
  external: [/^node:/, 'koffi'],
  plugins: [
    {
      name: 'worker-url',
      transform: (code) =>
        code.replaceAll(
          /new URL\('\.\/([\w-]*worker)\.ts', import\.meta\.url\)/g,
          "new URL('./$1.js', import.meta.url)",
        ),
    },
  ],
  output: {
    dir: 'dist',
    format: 'esm',
    cleanDir: true,
    entryFileNames: '[name].js',
    chunkFileNames: '[name]-[hash].js',
  },
})
