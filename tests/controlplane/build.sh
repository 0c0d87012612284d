#!/usr/bin/env bash
# Prints, as its only line on stdout, a directory that holds one set of programs, after building there what is missing:
# `build.sh` the control plane, `build.sh nodes` what real nodes need beside it. Progress and errors go to stderr.
# See README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

SET=${1:-controlplane}
case $SET in
  controlplane) BINARIES=(etcd kube-apiserver kube-controller-manager kubectl helm) ;;
  nodes)
    BINARIES=(kube-scheduler kubelet containerd containerd-shim-runc-v2 ctr runc bridge host-local loopback pause fakegpu)
    ;;
  *) echo "usage: build.sh [controlplane | nodes]" >&2; exit 2 ;;
esac
FROM_ASSETS=(etcd kube-apiserver kubectl)
MIN_GO_MINOR=26

say() { printf '%s: %s\n' "$SET" "$*" >&2; }
die() { say "error: $*"; exit 1; }

# What each build took when its dependencies were not in Go's cache yet, on two cores shared with other builds.
usual_seconds() {
  case $1 in
    etcd) echo 60 ;; kube-apiserver) echo 390 ;; kube-controller-manager) echo 160 ;; kubectl) echo 60 ;; helm) echo 100 ;;
    kubelet) echo 60 ;; containerd) echo 180 ;; *) echo 20 ;;
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

# What is compiled outside this module, as its own authors pinned its dependencies: program, package, version.
# Go checks each against its checksum database.
elsewhere() {
  case $1 in
    containerd | containerd-shim-runc-v2 | ctr) echo "github.com/containerd/containerd/v2/cmd/$1@v2.4.2" ;;
    runc) echo github.com/opencontainers/runc@v1.5.2 ;;
    bridge | loopback) echo "github.com/containernetworking/plugins/plugins/main/$1@v1.9.1" ;;
    host-local) echo "github.com/containernetworking/plugins/plugins/ipam/$1@v1.9.1" ;;
  esac
}

# runc needs libseccomp for the default seccomp profile of containers: the system's, else Debian's, unpacked beside the
# output and installed nowhere.
use_libseccomp() {
  pkg-config --exists libseccomp 2>/dev/null && return
  local dir=$1
  command -v apt-get >/dev/null && command -v dpkg >/dev/null && command -v pkg-config >/dev/null ||
    die "runc needs libseccomp and its headers, and pkg-config: install libseccomp-dev"
  mkdir -p "$dir"
  (cd "$dir" && { apt-get download -q libseccomp-dev || { apt-get update -q && apt-get download -q libseccomp-dev; }; } &&
    dpkg -x libseccomp-dev_*.deb .) >&2 || die "could not download libseccomp-dev: install it"
  local found
  found=$(dirname "$(find "$dir" -name libseccomp.pc -print -quit)")
  export PKG_CONFIG_PATH=$found PKG_CONFIG_SYSROOT_DIR=$dir
}

compile() {
  local name=$1 out=$2 kubernetes minor version package tags=
  export CGO_ENABLED=0
  kubernetes=$(pinned go.mod k8s.io/kubernetes)
  minor=${kubernetes#v1.}
  minor=${minor%%.*}
  if [[ $name == helm ]]; then
    version=$(pinned helm/go.mod helm.sh/helm/v3)
    # Without a cluster helm believes in this Kubernetes; the default is 1.20.
    local helm=helm.sh/helm/v3
    local flags="-X $helm/internal/version.version=$version"
    for package in chartutil lint/rules; do
      flags+=" -X $helm/pkg/$package.k8sVersionMajor=1 -X $helm/pkg/$package.k8sVersionMinor=$minor"
    done
    exec nice -n 3 go build -C helm -trimpath -o "$out" -ldflags="-s -w $flags" "$helm/cmd/helm"
  fi
  package=$(elsewhere "$name")
  if [[ -n $package ]]; then
    local flags="-s -w"
    if [[ $name == runc ]]; then
      export CGO_ENABLED=1
      use_libseccomp "$out.libseccomp"
      tags="seccomp netgo osusergo static_build"
      flags+=" -linkmode external -extldflags -static"
    elif [[ $name == containerd ]]; then
      tags="no_btrfs no_zfs no_devmapper"
    fi
    export GOBIN=$out.bin
    exec nice -n 3 go install -trimpath -tags="$tags" -ldflags="$flags" "$package"
  fi
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
  # `go install` names its output itself.
  [[ ! -d $out.bin ]] || mv -f "$out.bin/$name" "$out"
  mv -f "$out" "$dir/$name"
  rm -rf "$out.bin" "$out.libseccomp"
  say "[$3/$4] $name ready after $((SECONDS - started)) s"
}

# What a binary depends on: the pins, the mains and the flags they are built with.
mains=()
for name in "${BINARIES[@]}"; do [[ ! -e cmd/$name/main.go ]] || mains+=("cmd/$name/main.go"); done
hash=$({ declare -f compile elsewhere; LC_ALL=C sha256sum go.mod go.sum helm/go.mod helm/go.sum "${mains[@]}"; } | sha256sum | cut -c1-12)
if [[ -n ${GOGRID_CACHE:-} ]]; then
  cache=$GOGRID_CACHE
elif [[ -n ${XDG_CACHE_HOME:-} ]]; then
  cache=$XDG_CACHE_HOME/gogrid
else
  cache=${HOME:?set HOME, XDG_CACHE_HOME or GOGRID_CACHE: the binaries are kept there}/.cache/gogrid
fi
built=$cache/$SET-$hash
target=$built
needed=("${BINARIES[@]}")

assets=${KUBEBUILDER_ASSETS:-}
if [[ -n $assets && $SET == controlplane ]]; then
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
