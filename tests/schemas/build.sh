#!/usr/bin/env bash
# Prints, as its only line on stdout, a directory that holds one checker per Kubernetes minor version (1.32 …), after
# building there what is missing. Progress and errors go to stderr. Kept beside the control plane's binaries, under a hash
# of its own pins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

compile() { (cd "$1" && CGO_ENABLED=0 nice -n 3 go build -trimpath -ldflags="-s -w" -o "$2" ../main.go); }

hash=$({ declare -f compile; LC_ALL=C sha256sum main.go 1.*/go.mod 1.*/go.sum; } | sha256sum | cut -c1-12)
target=${GOGRID_CACHE:-${XDG_CACHE_HOME:-${HOME:?set HOME, XDG_CACHE_HOME or GOGRID_CACHE: the binaries are kept there}/.cache}/gogrid}/schemas-$hash
mkdir -p "$target"
exec 9>"$target/.lock"
flock 9
for minor in 1.*; do
  [[ -x $target/$minor ]] && continue
  echo "schemas: building the checker of Kubernetes $minor (usually 20 seconds the first time)" >&2
  compile "$minor" "$target/.$minor.partial" >&2
  mv -f "$target/.$minor.partial" "$target/$minor"
done
printf '%s\n' "$target"
