#!/usr/bin/env bash
# Prints, as its only line on stdout, a directory that holds etcd, kube-apiserver, kube-controller-manager, kubectl
# and helm, after building there what is missing. Progress and errors go to stderr. See README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

BINARIES=(etcd kube-apiserver kube-controller-manager kubectl helm)
FROM_ASSETS=(etcd kube-apiserver kubectl)
MIN_GO_MINOR=26

say() { printf 'controlplane: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# What each build took when its dependencies were not in Go's cache yet, on two cores shared with other builds.
usual_seconds() {
  case $1 in
    etcd) echo 60 ;; kube-apiserver) echo 390 ;; kube-controller-manager) echo 160 ;; kubectl) echo 60 ;; helm) echo 100 ;;
  esac
}

has_all() {
  local dir=$1 name
  shift
  for name in "$@"; do [[ -x $dir/$name ]] || return 1; done
}

pinned() { awk -v module="$2" '$1 == module && $2 ~ /^v/ { print $2; exit } $1 == "require" && $2 == module { print $3; exit }' "$1"; }

require_go() {
  local advice="install Go 1.$MIN_GO_MINOR or newer, or set KUBEBUILDER_ASSETS and GOGRID_CONTROLPLANE_BIN as README.md says"
  command -v go >/dev/null || die "Go is not on the PATH; $advice"
  local found minor
  # Asked inside the module, so that a Go which may fetch the toolchain named in go.mod does so.
  found=$(go version 2>&1) || die "Go refuses this module: $found; $advice"
  [[ $found =~ go1\.([0-9]+) ]] || die "cannot read a version in '$found'; $advice"
  minor=${BASH_REMATCH[1]}
  ((minor >= MIN_GO_MINOR)) || die "Go is too old: found '$found', needed go1.$MIN_GO_MINOR; $advice"
}

build_pid=
stop_build() { [[ -z $build_pid ]] || kill "$build_pid" 2>/dev/null || true; }
trap stop_build EXIT

compile() {
  local name=$1 out=$2 kubernetes version minor
  export CGO_ENABLED=0
  if [[ $name == helm ]]; then
    version=$(pinned helm/go.mod helm.sh/helm/v3)
    exec nice -n 3 go build -C helm -trimpath -o "$out" \
      -ldflags="-s -w -X helm.sh/helm/v3/internal/version.version=$version" helm.sh/helm/v3/cmd/helm
  fi
  kubernetes=$(pinned go.mod k8s.io/kubernetes)
  minor=${kubernetes#v1.}
  minor=${minor%%.*}
  # Without these the server calls itself v0.0.0 and some clients balk.
  local prefix=k8s.io/component-base/version
  exec nice -n 3 go build -trimpath -o "$out" \
    -ldflags="-s -w -X $prefix.gitVersion=$kubernetes -X $prefix.gitMajor=1 -X $prefix.gitMinor=$minor" "./cmd/$name"
}

# build NAME DIR NUMBER OF: leaves DIR/NAME finished or absent, never half written.
build() {
  local name=$1 dir=$2 started=$SECONDS told=0
  local out=$dir/.$name.partial
  say "[$3/$4] building $name (usually $(usual_seconds "$name") s the first time)"
  compile "$name" "$out" >&2 &
  build_pid=$!
  while kill -0 "$build_pid" 2>/dev/null; do
    sleep 1
    if ((SECONDS - started - told >= 30)); then
      told=$((SECONDS - started))
      say "[$3/$4] $name: $told s so far"
    fi
  done
  wait "$build_pid" || die "building $name failed; its messages are above"
  build_pid=
  mv -f "$out" "$dir/$name"
  say "[$3/$4] $name ready after $((SECONDS - started)) s"
}

# What a binary depends on: the pins, the mains and the flags they are built with.
hash=$({ declare -f compile; LC_ALL=C sha256sum go.mod go.sum helm/go.mod helm/go.sum cmd/*/main.go; } | sha256sum | cut -c1-12)
if [[ -n ${GOGRID_CACHE:-} ]]; then
  cache=$GOGRID_CACHE
elif [[ -n ${XDG_CACHE_HOME:-} ]]; then
  cache=$XDG_CACHE_HOME/gogrid
else
  cache=${HOME:?set HOME, XDG_CACHE_HOME or GOGRID_CACHE: the binaries are kept there}/.cache/gogrid
fi
built=$cache/controlplane-$hash
target=$built
needed=("${BINARIES[@]}")

assets=${KUBEBUILDER_ASSETS:-}
if [[ -n $assets ]]; then
  has_all "$assets" "${FROM_ASSETS[@]}" || die "KUBEBUILDER_ASSETS=$assets lacks one of: ${FROM_ASSETS[*]}"
  assets=$(cd "$assets" && pwd)
  target=$cache/assets-$(printf '%s %s' "$hash" "$assets" | sha256sum | cut -c1-12)
  needed=(kube-controller-manager helm)
fi

if ! has_all "$target" "${BINARIES[@]}"; then
  command -v flock >/dev/null || die "flock (util-linux) is not on the PATH"
  mkdir -p "$built" "$target"
  exec 9>"$built/.lock"
  flock -n 9 || { say "another build of the same binaries is running; waiting for it"; flock 9; }
  missing=()
  for name in "${needed[@]}"; do [[ -x $built/$name ]] || missing+=("$name"); done
  if ((${#missing[@]})); then
    require_go
    say "building ${missing[*]} into $built: once for this set of pinned versions"
    for i in "${!missing[@]}"; do build "${missing[i]}" "$built" $((i + 1)) "${#missing[@]}"; done
  fi
  if [[ $target != "$built" ]]; then
    for name in "${FROM_ASSETS[@]}"; do ln -sfn "$assets/$name" "$target/$name"; done
    for name in "${needed[@]}"; do ln -sfn "$built/$name" "$target/$name"; done
  fi
fi
printf '%s\n' "$target"
