import { type RestoreInit, type RestoreJob, type RestoreResult, Restorer } from './restore-files.ts'
import { serveJobs } from './thread-pool.ts'

serveJobs<RestoreInit, RestoreJob, RestoreResult>((init) => new Restorer(init))
