#!/usr/bin/env bash
# Process 1 of one test node, in mount, network, pid, uts and ipc namespaces of its own: everything of the node ends with
# it. Started by gogrid_tests::nodes, which also lays the cable (eth0).
#
# NODE its name, NUMBER and COUNT which of how many, DIR what it may write to, BIN its programs, CGROUP its cgroup root in
# every hierarchy, KUBECONFIG the kubelet's, RESTRICT_OOM true where containers can't be given less than our oom_score_adj.
set -euo pipefail

# Volumes that a container shares with its node must reach the node, and nothing further.
mount --make-rshared /
mount -t proc proc /proc
hostname "$NODE"
# The node's own, so that paths on it lie below DIR on this machine.
for dir in var/lib var/log opt srv; do
  mkdir -p "$DIR/fs/$dir"
  mount --bind "$DIR/fs/$dir" "/$dir"
done
mkdir -p /var/lib/{kubelet,cni,containerd} "$DIR/log"
mount -t tmpfs tmpfs /run
# The kubelet sets these for the whole machine; it may have files of its own instead.
own_sysctl() {
  mkdir -p "$DIR/sys"
  echo "$2" >"$DIR/sys/${1//\//_}"
  mount --bind "$DIR/sys/${1//\//_}" "/proc/sys/$1"
}
own_sysctl vm/overcommit_memory 1
own_sysctl vm/panic_on_oom 0
own_sysctl kernel/panic 10
own_sysctl kernel/panic_on_oops 1
own_sysctl kernel/keys/root_maxkeys 1000000
own_sysctl kernel/keys/root_maxbytes 25000000
: >"$DIR/resolv.conf"

until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip addr add "10.200.0.$((10 + NUMBER))/24" dev eth0
ip link set eth0 up
# The API server's Service address is its machine's own, so that no Service proxy is needed.
ip route add 10.96.0.1/32 via 10.200.0.1
for other in $(seq "$COUNT"); do
  [[ $other == "$NUMBER" ]] || ip route add "10.244.$other.0/24" via "10.200.0.$((10 + other))"
done
# Nothing is outside: say so at once instead of hanging.
ip route add unreachable default
echo 1 >/proc/sys/net/ipv4/ip_forward

mkdir -p "$DIR/cni"
cat >"$DIR/cni/10-pods.conflist" <<CNI
{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true,
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.$NUMBER.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
CNI
cat >"$DIR/containerd.toml" <<TOML
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "$DIR/containerd.sock"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "gogrid.test/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = $RESTRICT_OOM
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["$BIN"]
  conf_dir = "$DIR/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
    BinaryName = "$BIN/runc"
    SystemdCgroup = false
TOML
# Images come by import only, and an imported one must not be asked for credentials. Without failCgroupV1 a kubelet of 1.36
# refuses hosts that still have cgroup v1; on v2 it means nothing.
cat >"$DIR/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP
failSwapOn: false
containerRuntimeEndpoint: unix://$DIR/containerd.sock
imagePullCredentialsVerificationPolicy: NeverVerify
resolvConf: $DIR/resolv.conf
clusterDomain: cluster.local
clusterDNS: ["10.96.0.10"]
# Nobody but this cluster's own pods and its API server reaches this network.
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: "100Mi", nodefs.available: "100Mi", imagefs.available: "100Mi"}
volumePluginDir: /var/lib/kubelet/volume-plugins
nodeStatusUpdateFrequency: 4s
YAML

export PATH=$BIN:$PATH
containerd -c "$DIR/containerd.toml" >>"$DIR/log/containerd.log" 2>&1 &
# The kubelet runs whenever `kubelet.stop` is not there.
while :; do
  if [[ ! -e $DIR/kubelet.stop && -S $DIR/containerd.sock ]]; then
    kubelet --config="$DIR/kubelet.yaml" --kubeconfig="$KUBECONFIG" --hostname-override="$NODE" \
      --node-ip="10.200.0.$((10 + NUMBER))" >>"$DIR/log/kubelet.log" 2>&1 &
    wait $! || true
  fi
  sleep 0.1
done
