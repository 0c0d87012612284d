#!/usr/bin/env bash
# Builds the images of HEAD in two clones, in two folders of different names, with nothing in common but downloaded sources,
# and compares every byte. Takes half an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for name in a a-longer-name; do
  git clone --quiet . "$work/$name"
  CARGO_TARGET_DIR=$work/$name-target "$work/$name/charts/gogrid/images/programs.sh"
  cargo run --quiet --package gogrid-tests --bin images -- --out "$work/$name-images" --programs "$work/$name-target"
  rm -rf "$work/$name-target"
done
(cd "$work/a-images" && sha256sum -- *) >"$work/sums"
cat "$work/sums"
(cd "$work/a-longer-name-images" && sha256sum --check --strict --quiet "$work/sums")
echo "two builds in two folders: the same bytes"
