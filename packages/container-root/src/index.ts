export { EtcdLeases, type EtcdLeasesOptions } from './etcd-lease.ts'
export { FileLeases, type FileLeasesOptions } from './file-lease.ts'
export * from './lease.ts'
export * from './records.ts'
