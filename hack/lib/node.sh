# A node: containerd and kubelet with their own mounts, processes, cgroups and address range, and a make-believe GPU.
# shellcheck shell=bash

nodes() { find "$STATE/nodes" -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null | sort -V; }

node_ip() { echo "$SUBNET.0.${1#dev-}"; }

start_node() { # NAME: its init and containerd; kubelet comes later, when the API server is there
  local name=$1 dir=$STATE/nodes/$1
  mkdir -p "$dir/net.d"
  make_cgroup "$ID-$name"
  start_init "init/$name" -- node "$dir" "$(node_ip "$name")"
  # ptp routes every packet through the node, so Services work between pods of one node without br_netfilter
  cat >"$dir/net.d/10-ptp.conflist" <<C
{"cniVersion": "0.4.0", "name": "dev", "plugins": [{"type": "ptp", "ipam": {
  "type": "host-local", "dataDir": "$dir/cni/networks", "routes": [{"dst": "0.0.0.0/0"}],
  "ranges": [[{"subnet": "$SUBNET.${name#dev-}.0/24"}]]}}]}
C
  cat >"$dir/containerd.toml" <<C
version = 2
disabled_plugins = ["io.containerd.internal.v1.opt"] # it would make /opt/containerd on the machine
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:dev"
  restrict_oom_score_adj = true # a guest without CAP_SYS_RESOURCE cannot lower it
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$CNI_BIN"
    conf_dir = "$dir/net.d"
C
  start_containerd "$name"
}

start_containerd() { start "init/$1" "$1/containerd" containerd -c "$STATE/nodes/$1/containerd.toml"; }

start_kubelet() { # NAME
  local name=$1 dir=$STATE/nodes/$1
  wait_for "containerd of $name" 30 "$name/containerd" enter "init/$name" ctr version
  import_images "$name" "$CACHE/pause.tar"
  : >"$dir/resolv.conf"
  cat >"$dir/kubelet.yaml" <<C
kind: KubeletConfiguration
apiVersion: kubelet.config.k8s.io/v1beta1
address: $(node_ip "$name")
healthzPort: 0
cgroupDriver: cgroupfs
cgroupRoot: /$ID-$name
failSwapOn: false
failCgroupV1: false
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDomain: cluster.local
clusterDNS: [$NODE_IP]
resolvConf: $dir/resolv.conf
volumePluginDir: /var/lib/kubelet/volume-plugins
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi}
C
  date -u +%FT%TZ >"$dir/started"
  start "init/$name" "$name/kubelet" "$BIN/kubelet" --config "$dir/kubelet.yaml" --kubeconfig "$PKI/$name.kubeconfig" \
    --hostname-override "$name" --node-ip "$(node_ip "$name")"
}

node_reported() { # NAME: Ready by its kubelet's own word since that was started
  local ready heartbeat
  read -r ready heartbeat < <(kubectl get node "$1" -o \
    'jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.lastHeartbeatTime}{end}')
  [ "$ready" = True ] && [[ ! $heartbeat < $(cat "$STATE/nodes/$1/started") ]]
}

wait_for_node() { # NAME: Ready, with GPUs, which the scheduler takes for real and a restarted kubelet forgets
  local gpus
  gpus=$(cat "$STATE/gpus")
  wait_for "node $1" 60 "$1/kubelet" node_reported "$1"
  gpus="{\"nvidia.com/gpu\": \"$gpus\"}"
  kubectl patch node "$1" --subresource=status \
    -p "{\"status\": {\"capacity\": $gpus, \"allocatable\": $gpus}}" >/dev/null
}
