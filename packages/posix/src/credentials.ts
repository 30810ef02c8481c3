import { readFileSync, statSync } from 'node:fs'

// Bit numbers of linux/capability.h: the index in this list.
const CAPABILITIES = [
  'CAP_CHOWN',
  'CAP_DAC_OVERRIDE',
  'CAP_DAC_READ_SEARCH',
  'CAP_FOWNER',
  'CAP_FSETID',
  'CAP_KILL',
  'CAP_SETGID',
  'CAP_SETUID',
  'CAP_SETPCAP',
  'CAP_LINUX_IMMUTABLE',
  'CAP_NET_BIND_SERVICE',
  'CAP_NET_BROADCAST',
  'CAP_NET_ADMIN',
  'CAP_NET_RAW',
  'CAP_IPC_LOCK',
  'CAP_IPC_OWNER',
  'CAP_SYS_MODULE',
  'CAP_SYS_RAWIO',
  'CAP_SYS_CHROOT',
  'CAP_SYS_PTRACE',
  'CAP_SYS_PACCT',
  'CAP_SYS_ADMIN',
  'CAP_SYS_BOOT',
  'CAP_SYS_NICE',
  'CAP_SYS_RESOURCE',
  'CAP_SYS_TIME',
  'CAP_SYS_TTY_CONFIG',
  'CAP_MKNOD',
  'CAP_LEASE',
  'CAP_AUDIT_WRITE',
  'CAP_AUDIT_CONTROL',
  'CAP_SETFCAP',
  'CAP_MAC_OVERRIDE',
  'CAP_MAC_ADMIN',
  'CAP_SYSLOG',
  'CAP_WAKE_ALARM',
  'CAP_BLOCK_SUSPEND',
  'CAP_AUDIT_READ',
  'CAP_PERFMON',
  'CAP_BPF',
  'CAP_CHECKPOINT_RESTORE',
] as const

/** A capability by its name in capabilities(7). */
export type Capability = (typeof CAPABILITIES)[number]

/** Whether this thread has a capability in effect, in its own user namespace. Source: proc_pid_status(5), CapEff. */
export function hasCapability(name: Capability): boolean {
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(readFileSync('/proc/thread-self/status', 'latin1'))?.[1]
  return effective !== undefined && ((BigInt(`0x${effective}`) >> BigInt(CAPABILITIES.indexOf(name))) & 1n) === 1n
}

// The initial user namespace has had this inode number since Linux 3.8 (PROC_USER_INIT_INO).
const INITIAL_USER_NAMESPACE = 0xefff_fffd

/** Whether this process is in the initial user namespace. Source: user_namespaces(7), /proc/self/uid_map. */
export function isInitialUserNamespace(): boolean {
  const wholeMap = /^\s*0\s+0\s+4294967295\s*$/.test(readFileSync('/proc/self/uid_map', 'latin1'))
  try {
    // Root may give a child namespace the whole map too, so the map alone is not proof.
    return wholeMap && statSync('/proc/self/ns/user').ino === INITIAL_USER_NAMESPACE
  } catch {
    return wholeMap
  }
}

/**
 * Whether `trusted.*` attributes can be read and written here. Where they cannot, the kernel lists files as if they had
 * none, so a layer's marks would be missed in silence. Source: xattr(7), "Trusted extended attributes".
 */
export function seesTrustedXattrs(): boolean {
  return hasCapability('CAP_SYS_ADMIN') && isInitialUserNamespace()
}
