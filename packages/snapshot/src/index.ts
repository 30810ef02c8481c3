export * from './backend/backend.ts'
export { LocalBackend } from './backend/local.ts'
