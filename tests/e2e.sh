#!/usr/bin/env bash
# Runs every integration test once; arguments go to `cargo test`. What mostly waits for leases, kubelets and API servers runs
# in lanes beside each other; what measures time or CPU, and whatever is in no lane, has the machine to itself afterwards.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."

lanes=(
  "nodes"
  "idle bad_input chart contract jobs life"
  "nvml observed outage"
  "chart_values confinement controlplane crashes crd_rules store_model"
)

alone=()
for file in */tests/*.rs */tests/*/main.rs */*/tests/*.rs */*/tests/*/main.rs; do
  name=${file%/main.rs} name=${name##*/} name=${name%.rs}
  [[ " ${lanes[*]} ${alone[*]-} " == *" $name "* ]] || alone+=("$name")
done

arguments=("$@")
run() {
  local flags=() name
  for name in "$@"; do flags+=(--test "$name"); done
  cargo test --workspace --no-fail-fast "${arguments[@]}" "${flags[@]}" -- --test-threads=1
}

logs=$(mktemp -d) failed=0 running=()
trap 'rm -rf "$logs"' EXIT
# Ctrl-C doesn't reach what runs in the background by itself.
trap 'trap - TERM; kill 0' INT TERM
for lane in "${lanes[@]}"; do
  echo "== beside others: $lane"
  # shellcheck disable=SC2086
  run $lane >"$logs/${#running[@]}" 2>&1 &
  running+=($!)
done
for lane in "${!running[@]}"; do
  wait "${running[lane]}" || failed=1
  cat "$logs/$lane"
done
echo "== alone: ${alone[*]}"
run "${alone[@]}" || failed=1
exit "$failed"
