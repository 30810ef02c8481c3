// `npm start` shows the main job on real input; `npm start -- merge …` is the command itself.
if (process.argv.length > 2) await import('../packages/cli/src/main.ts')
else {
  const { buildCli } = await import('./build.ts')
  buildCli()
  const { enterDemo } = await import('./demo.ts')
  process.exitCode = await enterDemo()
}
