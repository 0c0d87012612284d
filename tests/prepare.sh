#!/usr/bin/env bash
# Checks that this machine has what a build needs and installs the Debian packages that are missing, when root.
set -euo pipefail

missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
if ((${#missing[@]})); then
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "== installing ${missing[*]} by apt"
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "${missing[@]}"
  else
    echo "error: this machine has no C compiler (cc): install ${missing[*]}" >&2
    exit 1
  fi
fi
for tool in cargo go; do
  command -v "$tool" >/dev/null && continue
  echo "error: $tool is not on the PATH: install Rust (rustup) and Go 1.26 or newer" >&2
  exit 1
done

# Checkouts share one build folder and cargo judges by the times of files: what another checkout built there last is older
# than every source of this one.
if [[ -n ${CARGO_TARGET_DIR:-} && $(cat "$CARGO_TARGET_DIR/checkout" 2>/dev/null) != "$PWD" ]]; then
  mkdir -p "$CARGO_TARGET_DIR"
  find . -name .git -prune -o \( -name '*.rs' -o -name Cargo.toml \) -exec touch {} +
  printf '%s' "$PWD" >"$CARGO_TARGET_DIR/checkout"
fi
