# Settings, messages and waiting. Every setting of the development cluster is read here and nowhere else.
# shellcheck shell=bash disable=SC2034

ROOT=$(cd "$HACK/.." && pwd)
# Shared between clones: programs, base image, pod environments
CACHE=${COSERVE_CACHE:-$HOME/.cache/coserve}
BIN=$CACHE/bin-$(cat "$HACK"/devcluster/{go.mod,go.sum,compile,*/*.go} | sha256sum | cut -c1-12)
# One cluster: its data, logs and credentials; and the name of its processes and cgroups
STATE=$(realpath -m "${COSERVE_CLUSTER_STATE:-$ROOT/.cache/cluster}")
ID=coserve-$(sha256sum <<<"$STATE" | cut -c1-8)
PKI=$STATE/pki
LOGS=$STATE/log
KUBECONFIG_FILE=$PKI/admin.kubeconfig
CONTROL_PLANE=(etcd apiserver controller-manager scheduler proxy dns)
FIRST_NODE=dev-1
# Addresses: node i has $SUBNET.0.i, its pods $SUBNET.i.0/24; cluster IPs are in $SERVICES.0.0/16
SUBNET=10.$((64 + 16#${ID:8:2} % 64))
SERVICES=10.250
NODE_IP=$SUBNET.0.1 # the first node's, with the API server and DNS
CNI_BIN=/usr/lib/cni # of the Debian package containernetworking-plugins
DEBIAN_MIRROR=${COSERVE_DEBIAN_MIRROR:-}

say() { printf '%s\n' "$*" >&2; }

die() { say "cluster: $*"; exit 1; }

development_digest() { cat "$ROOT/requirements/dev.txt" "$ROOT/pyproject.toml" | sha256sum; } # what .venv is made from

need_root() { [ "$EUID" = 0 ] || die "'$1' must run as root: sudo -H $0 $1"; }

# LABEL LOG CMD...: run CMD with its output in LOG; say every 10 s for how long it has run, and the log's last line.
progress() (
  label=$1 log=$2 start=$SECONDS next=10
  shift 2
  say "$label"
  mkdir -p "$(dirname "$log")"
  set -m # a process group of its own, so that all of it ends with us
  "$@" >"$log" 2>&1 </dev/null &
  pid=$!
  set +m
  trap 'kill -- "-$pid" 2>/dev/null || true' EXIT
  while kill -0 "$pid" 2>/dev/null; do
    sleep .2
    if ((SECONDS - start >= next)); then
      say "  $((SECONDS - start)) s: $(tail -n 1 "$log" | tr -d '\r' | cut -c1-110)"
      next=$((next + 10))
    fi
  done
  if ! wait "$pid"; then
    tail -n 15 "$log" >&2
    die "failed: $label; see $log"
  fi
)

# COUNT CMD...: run CMD, and where it fails, again after 5 s: an API server that has just started on a busy machine may
# not answer in time.
tries() {
  local left=$1
  shift
  until "$@"; do
    ((--left)) || return 1
    sleep 5
  done
}

# NAME FILE: hold FILE's lock on descriptor 9 until this process and what it started with the descriptor open are gone.
lock() {
  mkdir -p "$(dirname "$2")"
  exec 9>"$2"
  flock -n 9 && return
  say "waiting for another $1 to finish"
  flock 9
}

# WHAT SECONDS PROGRAM CMD...: poll CMD until it succeeds; fail at once when PROGRAM is gone.
wait_for() {
  local what=$1 end=$((SECONDS + $2)) program=$3
  shift 3
  until "$@" >/dev/null 2>&1; do
    if ! find_process "$program" >/dev/null; then
      tail -n 5 "$(log_of "$program")" >&2
      die "$what failed: $program has ended; see $(log_of "$program")"
    fi
    ((SECONDS < end)) || die "$what is not ready in time; see $(log_of "$program")"
    sleep .1
  done
}
