import { ChunkStorer, type StoreJob, type StoreResult } from './chunk-storer.ts'
import { type SaveInit, Saver } from './save.ts'
import { serveJobs } from './thread-pool.ts'

serveJobs<SaveInit, StoreJob, StoreResult>((init) => new ChunkStorer(new Saver(init), init.segments.length))
