#!/usr/bin/env bash
# Builds the programs for release into $CARGO_TARGET_DIR: the same source gives the same bytes in whatever folder.
set -euo pipefail
target=${CARGO_TARGET_DIR:?where cargo builds}
cd "$(dirname "$0")/../../.."

# Programs must not hold where they were built: panics name source files, C code may too.
homes=("$PWD=/gogrid" "$target=/target" "${CARGO_HOME:-$HOME/.cargo}=/cargo" "$(rustc --print sysroot)=/rust")
for home in "${homes[@]}"; do
  RUSTFLAGS="${RUSTFLAGS:-} --remap-path-prefix=$home"
  CFLAGS="${CFLAGS:-} -ffile-prefix-map=$home"
done
export RUSTFLAGS CFLAGS

# What the operator's image holds runs without any library.
musl=x86_64-unknown-linux-musl
rustup target list --installed 2>/dev/null | grep -qx "$musl" || rustup target add "$musl"
echo "== operator, static"
CC_x86_64_unknown_linux_musl=cc cargo auditable build --release --locked --target "$musl" --package gogrid-operator
echo "== agent and worker"
cargo auditable build --release --locked --package gogrid-agent --package gogrid-worker
