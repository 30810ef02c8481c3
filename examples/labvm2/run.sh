#!/usr/bin/env bash
# A Debian container that goes from one node to another and back, on this machine alone. README.md says what is shown.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
lsync=${LSYNC:-$here/../../packages/cli/bin/lsync}
base=${BASE:-}   # a tar of a root file system; by default debootstrap makes one
store=${STORE:-} # a directory on a mounted store; by default one on the local disk

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() {
  echo "$*" >&2
  exit 1
}
[ "$(id -u)" -eq 0 ] || fail 'run this as root'
for program in runc ip ssh ssh-keygen nsenter unshare; do
  command -v "$program" >/dev/null || fail "$program is missing"
done
[ -x /usr/sbin/sshd ] || fail 'sshd is missing'
[ -n "$base" ] || command -v debootstrap >/dev/null || fail 'debootstrap is missing; or name a tar in BASE'

scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/lsync-labvm2-XXXXXX")
[ -n "$store" ] || { store=$scratch/store && mkdir "$store"; }
home=$(mktemp -d "$store/labvm2-XXXXXX")/home
network=labvm2-$$
sshd_pids=()

# shellcheck disable=SC2317 # the trap calls it
clean_up() {
  for node in node1 node2; do
    runc --root "$scratch/$node/runc" delete --force lab 2>/dev/null || true
    on "$node" "$lsync root unmount lab --state $scratch/$node/state" >/dev/null 2>&1 || true
  done
  for pid in "${sshd_pids[@]}"; do
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  for node in node1 node2; do ip netns delete "$network-$node" 2>/dev/null || true; done
  rm -rf --one-file-system "${home%/home}" "$scratch"
}
trap clean_up EXIT

address() { echo "10.97.0.${1#node}"; }

# Runs a command on a node: a person who is logged in there.
on() {
  nsenter --net="/var/run/netns/$network-$1" ssh -F "$scratch/ssh_config" "$(address "$1")" "$2" </dev/null
}
on_lsync() { on "$1" "$lsync $2 --state $scratch/$1/state"; }
inside() { on "$1" "runc --root $scratch/$1/runc exec lab sh -euc '$2'"; }

say 'Two nodes: each with its own network, host name, sshd and state'
ssh-keygen -q -t ed25519 -N '' -f "$scratch/key"
cat >"$scratch/ssh_config" <<END
User root
IdentityFile $scratch/key
IdentitiesOnly yes
UserKnownHostsFile $scratch/known_hosts
StrictHostKeyChecking yes
BatchMode yes
END
mkdir -p /run/sshd
for node in node1 node2; do
  mkdir -m 700 "$scratch/$node" "$scratch/$node/state"
  ip netns add "$network-$node"
  ssh-keygen -q -t ed25519 -N '' -f "$scratch/$node/host_key"
  echo "$(address "$node") $(cut -d ' ' -f 1,2 "$scratch/$node/host_key.pub")" >>"$scratch/known_hosts"
  cat >"$scratch/$node/sshd_config" <<END
ListenAddress $(address "$node")
HostKey $scratch/$node/host_key
AuthorizedKeysFile $scratch/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
END
done
ip link add line netns "$network-node1" type veth peer name line netns "$network-node2"
for node in node1 node2; do
  ip -n "$network-$node" address add "$(address "$node")/24" dev line
  ip -n "$network-$node" link set lo up
  ip -n "$network-$node" link set line up
done
for node in node1 node2; do
  # shellcheck disable=SC2016 # the inner shell expands it
  nsenter --net="/var/run/netns/$network-$node" unshare --uts sh -c 'hostname "$0" && exec "$@"' "$node" \
    /usr/sbin/sshd -D -e -f "$scratch/$node/sshd_config" 2>"$scratch/$node/sshd.log" &
  sshd_pids+=($!)
done
for node in node1 node2; do
  for _ in $(seq 50); do
    if on "$node" true 2>/dev/null; then break; fi
    sleep 0.2
  done
  echo "$(on "$node" hostname) is $(address "$node")"
done

if [ -z "$base" ]; then
  say 'A Debian root'
  debootstrap --variant=minbase bookworm "$scratch/debian" >/dev/null
  base=$scratch/debian
fi

say 'The home of the root on the store'
on_lsync node1 "root init lab --home $home --base $base"

say 'On each node a bundle for runc, and how the container is stopped, started and looked at there'
for node in node1 node2; do
  mkdir "$scratch/$node/bundle"
  "$here/bundle.sh" "$scratch/$node/state/roots/lab/merged" >"$scratch/$node/bundle/config.json"
  runc="runc --root $scratch/$node/runc"
  on_lsync "$node" "hooks lab --home $home --preset runc --container lab --bundle $scratch/$node/bundle \
    --runc-root $scratch/$node/runc --health '$runc exec lab dpkg --status dpkg'" >/dev/null
done

start() {
  on "$1" "runc --root $scratch/$1/runc run --detach --bundle $scratch/$1/bundle lab >/dev/null 2>&1 </dev/null"
}
switch() {
  on_lsync "$1" "switch lab --to ssh://root@$(address "$2") --rsh 'ssh -F $scratch/ssh_config' \
    --remote-lsync $lsync --remote-state $scratch/$2/state"
}

say 'It runs on node1, and somebody works in it'
on_lsync node1 'root mount lab'
start node1
inside node1 'echo hello > /root/from-node1; mv /etc/motd /etc/welcome; rm -r /usr/share/doc/bash; dpkg --purge e2fsprogs'

say 'To node2'
switch node1 node2
inside node2 'cat /root/from-node1; ls /etc/welcome; ! dpkg --status e2fsprogs'

say 'Work goes on there, and it comes back'
inside node2 'echo hello again > /root/from-node2'
switch node2 node1
inside node1 'cat /root/from-node1 /root/from-node2'

say 'Its history, as both nodes know it'
on_lsync node1 'root versions lab'
[ "$(on_lsync node1 'root versions lab')" = "$(on_lsync node2 'root versions lab')" ] || fail 'the nodes differ'

say 'Back to what it was when it left node1 for the first time'
on node1 "runc --root $scratch/node1/runc delete --force lab"
on_lsync node1 'root unmount lab'
on_lsync node1 'root rollback lab --to 2 --discard --yes'
on_lsync node1 'root mount lab'
start node1
inside node1 'ls /root'
