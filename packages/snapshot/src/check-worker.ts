import { type CheckInit, type CheckJob, type CheckResult, PackChecker } from './check-pack.ts'
import { serveJobs } from './thread-pool.ts'

serveJobs<CheckInit, CheckJob, CheckResult>((init) => new PackChecker(init))
