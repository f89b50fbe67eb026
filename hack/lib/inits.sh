# Runs as PID 1 of new namespaces: prepares them by the function named in the arguments, then waits for ever, reaping.
# Mounts made here are seen neither by the machine nor by the other node, and go when the last process in here goes.
# shellcheck shell=bash

cluster() { # SUBNET
  mount --make-rshared /
  echo 1 >/proc/sys/net/ipv4/ip_forward
  ip link set lo up
  # The way out: nobody answers there. It only makes every address routable, so that Services can be translated.
  ip link add out0 type veth peer name nowhere
  ip addr add "$1.0.1/16" dev out0
  ip link set nowhere up
  ip link set out0 up
  ip route add default dev out0
  nft -f - <<N
table inet coserve {
  chain forward { # pods learn at once that there is no way out
    type filter hook forward priority 0
    oifname "out0" reject
  }
}
N
}

node() { # FOLDER ADDRESS: its own view of the places where containerd, kubelet and the CNI plugins keep their state
  local file
  ip addr add "$2/32" dev out0 2>/dev/null || true
  mount --make-rshared /
  mkdir -p /var/lib/{kubelet,containerd,cni} /var/log/{pods,containers} /run/{containerd,netns}
  mkdir -p "$1"/{kubelet,containerd,cni,pods,containers,sysctl}
  mount --bind "$1/kubelet" /var/lib/kubelet
  mount --bind "$1/containerd" /var/lib/containerd
  mount --bind "$1/cni" /var/lib/cni
  mount --bind "$1/pods" /var/log/pods
  mount --bind "$1/containers" /var/log/containers
  mount -t tmpfs tmpfs /run/containerd
  mount -t tmpfs tmpfs /run/netns
  mount --make-rshared /run/netns
  for file in vm/{overcommit_memory,panic_on_oom} kernel/{panic,panic_on_oops,keys/root_maxkeys,keys/root_maxbytes}; do
    # kubelet sets these for the whole machine: give it files to write instead
    cat "/proc/sys/$file" >"$1/sysctl/${file//\//.}"
    mount --bind "$1/sysctl/${file//\//.}" "/proc/sys/$file"
  done
}

name=$1
shift
"$@"
exec -a "$name" catatonit -P 9>&-
