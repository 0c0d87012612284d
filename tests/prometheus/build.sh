#!/usr/bin/env bash
# Prints, as its only line on stdout, a directory that holds promtool and prometheus, after building there what is
# missing. Progress and errors go to stderr. Kept beside the control plane's binaries, under a hash of its own pins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

BINARIES=(promtool prometheus)

compile() {
  # No service discovery but static targets and files: half of Prometheus is clients of clouds.
  CGO_ENABLED=0 nice -n 3 go build -trimpath -tags remove_all_sd -ldflags="-s -w" -o "$2" \
    "github.com/prometheus/prometheus/cmd/$1"
}

hash=$({ declare -f compile; LC_ALL=C sha256sum go.mod go.sum; } | sha256sum | cut -c1-12)
target=${GOGRID_CACHE:-${XDG_CACHE_HOME:-${HOME:?set HOME, XDG_CACHE_HOME or GOGRID_CACHE: the binaries are kept there}/.cache}/gogrid}/prometheus-$hash
mkdir -p "$target"
exec 9>"$target/.lock"
flock 9
for name in "${BINARIES[@]}"; do
  [[ -x $target/$name ]] && continue
  echo "prometheus: building $name (usually 2 minutes the first time)" >&2
  started=$SECONDS
  compile "$name" "$target/.$name.partial" >&2
  mv -f "$target/.$name.partial" "$target/$name"
  echo "prometheus: $name ready after $((SECONDS - started)) s" >&2
done
printf '%s\n' "$target"
