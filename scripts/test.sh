#!/usr/bin/env bash
# Installs what the tests need and runs everything: types, lint, and every test. Arguments go to Vitest.
set -u
cd "$(dirname "$0")/.." || exit 1
exec </dev/null

# What the tests call, by the package that brings it. Without root the tests that need a missing one are skipped.
packages=(
  acl attr bindfs btrfs-progs crun debootstrap dosfstools e2fsprogs erofs-utils etcd-server fish gcc iproute2 iptables libarchive-tools
  libc6-dev libcap2-bin memcached moosefs-chunkserver moosefs-client moosefs-master openssh-client openssh-server
  openssl podman python3 rclone restic rsync runc shellcheck skopeo strace swift-account swift-container swift-object
  swift-proxy tar umoci util-linux xfsprogs zsh zstd
)

install_packages() {
  command -v apt-get dpkg-query >/dev/null || return 0
  local missing=() package
  for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  if [ "$(id -u)" -ne 0 ]; then
    echo "Without root these are not installed, and tests that need them are skipped: ${missing[*]}"
    return
  fi
  echo "Installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null && return
  # One that this release lacks must not keep the others away.
  for package in "${missing[@]}"; do
    apt-get install -y -qq --no-install-recommends "$package" >/dev/null || echo "could not install $package"
  done
}

failed_checks=()
check() {
  local name=$1
  shift
  echo "== $name"
  "$@" || failed_checks+=("$name")
}

npx --yes pnpm@12 install --frozen-lockfile || exit 1
install_packages

node=$PWD/node_modules/.bin/node
check 'build' "$node" scripts/build.ts
check 'types' node_modules/.bin/tsc --noEmit
check 'style' node_modules/.bin/biome check .
check 'imports' "$node" scripts/lint-imports.ts
if command -v shellcheck >/dev/null; then
  check 'shell scripts' shellcheck packages/cli/bin/lsync scripts/test.sh .ci/run examples/*/*.sh
fi

echo '== tests'
report=$(mktemp)
trap 'rm -f "$report"' EXIT
node_modules/.bin/vitest run --reporter=default --reporter=json --outputFile.json="$report" "$@"
vitest_status=$?

"$node" scripts/summarize-tests.ts "$report" "$vitest_status" "${failed_checks[@]}"
