import fc from 'fast-check'

// A landing is judged by the same cases each time; everywhere else each run looks at new ones (LSYNC_TEST_RUNS for more).
if (process.env['CI'] === 'true') fc.configureGlobal({ seed: 20261122 })
