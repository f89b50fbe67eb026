# up, down, status, and single programs: stop, start, restart.
# shellcheck shell=bash

claim_state() { # what `down` deletes must be ours
  if [ ! -e "$STATE/.coserve-cluster" ] && [ -n "$(find "$STATE" -mindepth 1 -print -quit 2>/dev/null)" ]; then
    die "$STATE is not empty and not a cluster's state folder; choose another by COSERVE_CLUSTER_STATE"
  fi
  mkdir -p "$LOGS"
  touch "$STATE/.coserve-cluster"
}

up() { # [--nodes N] [--gpus N]
  local count=2 gpus=1 began=$SECONDS name names=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --nodes) count=$2 ;;
      --gpus) gpus=$2 ;;
      *) die "up takes --nodes N and --gpus N (per node), not '$1'" ;;
    esac
    shift 2
  done
  [[ $count =~ ^[1-9]$ && $gpus =~ ^[0-9]+$ ]] || die "up needs 1 to 9 nodes and a number of GPUs"
  need_root up
  name=$(missing_packages | sort -u | tr '\n' ' ')
  [ -z "$name" ] || die "missing: $name; run '$0 install' first"
  build
  claim_state
  lock up "$STATE/lock"
  if [ -e "$STATE/ready" ] && running; then
    say "the cluster is up already: $STATE"
    return
  fi
  take_down
  rm -rf "$LOGS"
  mkdir -p "$LOGS"
  echo "$gpus" >"$STATE/gpus"
  trap 'give_up $?' EXIT
  trap 'exit 130' INT TERM HUP
  for ((i = 1; i <= count; i++)); do names+=("dev-$i"); done
  say "starting $count nodes in $STATE"
  make_pki "${names[@]}" || die "making certificates failed; see $LOGS/pki.log"
  pause_image
  start_init init --net -- cluster "$SUBNET"
  start_etcd
  start_apiserver
  for name in "${names[@]}"; do start_node "$name"; done
  wait_for_etcd
  wait_for_apiserver
  start_controller-manager
  start_scheduler
  start_dns
  start_proxy
  for name in "${names[@]}"; do start_kubelet "$name"; done
  for name in "${names[@]}"; do wait_for_node "$name"; done
  wait_for_dns
  touch "$STATE/ready"
  trap - EXIT INT TERM HUP
  say "up after $((SECONDS - began)) s. Try: $0 run kubectl get nodes"
}

give_up() { # an interrupted or failed start leaves its logs and nothing else
  trap '' INT TERM HUP
  trap - EXIT
  say "cluster: the start was given up; taking down what was started (logs stay in $LOGS)"
  take_down
  exit "$(($1 > 0 ? $1 : 1))"
}

take_down() {
  rm -f "$STATE/ready"
  end init KILL
  end_leftovers
  remove_cgroups
  [ -e "$STATE/.coserve-cluster" ] || return 0
  # Where the disk is told of each deletion and answers late, one at a time takes half a minute
  [ ! -d "$STATE/nodes" ] || find "$STATE/nodes" -type f -print0 | xargs -0 -r -P 8 -n 100 rm -f
  rm -rf "${STATE:?}"/{etcd,nodes,pki,bin,gpus,proxy.yaml,Corefile}
}

down() {
  need_root down
  [ ! -d "$STATE" ] || lock "up or down" "$STATE/lock"
  take_down
  say "down: $STATE"
}

programs() { # of this cluster, as `stop` and `start` take them
  local node
  printf '%s\n' "${CONTROL_PLANE[@]}"
  for node in $(nodes); do printf '%s\n' "$node" "$node/containerd" "$node/kubelet"; done
}

status() {
  local name pid
  running || die "no cluster is up here: $STATE"
  for name in $(programs); do
    [[ $name != dev-[1-9] ]] || continue
    if pid=$(find_process "$name"); then
      printf '%-20s pid %s\n' "$name" "$pid"
    else
      printf '%-20s not running, see %s\n' "$name" "$(log_of "$name")"
    fi
  done
  kubectl get nodes -o custom-columns="NODE:.metadata.name,READY:.status.conditions[?(@.type=='Ready')].status,$(
  )GPUS:.status.allocatable.nvidia\.com/gpu"
  kubectl get pods -A
}

stop_program() { # PROGRAM [SIGNAL]; NODE is all of it at once, as if unplugged
  case "$1" in
    dev-[1-9]) end "init/$1" KILL ;;
    *) end "$1" "${2:-TERM}" ;;
  esac
}

start_program() {
  case "$1" in
    dev-[1-9])
      start_node "$1"
      start_kubelet "$1"
      wait_for_node "$1"
      ;;
    dev-[1-9]/containerd) start_containerd "${1%/*}" ;;
    dev-[1-9]/kubelet)
      start_kubelet "${1%/*}"
      wait_for_node "${1%/*}"
      ;;
    *) "start_$1" ;;
  esac
  case "$1" in
    etcd) wait_for_etcd ;;
    apiserver) wait_for_apiserver ;;
    dns) wait_for_dns ;;
  esac
}

program() { # VERB PROGRAM [SIGNAL]
  local verb=$1
  shift
  need_root "$verb"
  running || die "no cluster is up here ($STATE); start it with: $0 up"
  programs | grep -qxF -- "${1:-}" || die "$verb takes one of: $(programs | tr '\n' ' ')"
  [ "$verb" = start ] || stop_program "$@"
  [ "$verb" = stop ] || start_program "$1"
}
