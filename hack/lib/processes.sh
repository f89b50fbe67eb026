# The cluster is one process tree: an init in PID, mount and network namespaces of its own, and below it one init per
# node with PID and mount namespaces. Whatever state it is in, ending the first init ends every process and drops every
# mount with it.
# Each program's argv[0] is "$ID/NAME", which is how it is found again: no PID files that could be stale.
# shellcheck shell=bash

log_of() { echo "$LOGS/${1//\//-}.log"; }

# NAME: print the PID (as this machine sees it) of the program, or fail. "init" is the cluster's, "init/NODE" a node's.
find_process() {
  local dir name
  for dir in /proc/[0-9]*; do
    { IFS= read -r -d '' name <"$dir/cmdline"; } 2>/dev/null || continue
    if [ "$name" = "$ID/$1" ]; then
      echo "${dir#/proc/}"
      return
    fi
  done
  return 1
}

running() { find_process init >/dev/null; }

# CMD...: in the cluster's network, else on the machine as it is. The variable lets `down` find what is left there.
# (Not `ip netns exec`: that mounts another /sys, which hides the cgroups.)
inside() {
  local pid
  pid=$(find_process init) || die "no cluster is up here ($STATE); start it with: $0 up"
  COSERVE_CLUSTER=$ID nsenter -t "$pid" --net -- "$@"
}

# SCOPE CMD...: in all namespaces of the cluster ("init") or of a node ("init/NODE"), with a bare environment.
enter() {
  local pid
  pid=$(find_process "$1") || die "$1 is not running"
  shift
  env -i PATH="$BIN:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" HOME=/root \
    nsenter -t "$pid" --net --mount --pid -- "$@"
}

# SCOPE NAME CMD...: start a program that outlives this script.
start() {
  local scope=$1 name=$2
  shift 2
  # shellcheck disable=SC2016
  enter "$scope" nice -n 10 bash -c 'exec 9>&- >>"$1" 2>&1 </dev/null; shift; setsid bash -c '\''exec -a "$0" "$@"'\'' "$@" &' \
    start "$(log_of "$name")" "$ID/$name" "$@"
  for _ in {1..40}; do
    ! find_process "$name" >/dev/null || return 0
    sleep .05
  done
}

# NAME [SIGNAL]: end a program and wait until it is gone.
end() {
  local pid
  pid=$(find_process "$1") || return 0
  kill "-${2:-TERM}" "$pid" 2>/dev/null || true
  for _ in {1..100}; do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep .1
  done
  kill -9 "$pid" 2>/dev/null || true
  while kill -0 "$pid" 2>/dev/null; do sleep .05; done
}

# NAME FLAG... -- CMD...: start an init in new namespaces, which CMD, a function of inits.sh, prepares; wait for it.
start_init() {
  local name=$1 flags=() launch=(env -i PATH="$PATH" HOME=/root "COSERVE_CLUSTER=$ID") pid
  shift
  while [ "$1" != -- ]; do
    flags+=("$1")
    shift
  done
  shift
  [ "$name" = init ] || launch+=(nsenter -t "$(find_process init)" --net --mount --pid --)
  launch+=(unshare "${flags[@]}" --fork --pid --mount-proc --propagation slave)
  launch+=(bash -euo pipefail "$HACK/lib/inits.sh" "$ID/$name" "$@")
  setsid "${launch[@]}" 9>&- >"$(log_of "$name")" 2>&1 </dev/null &
  pid=$!
  disown
  for _ in {1..200}; do
    ! find_process "$name" >/dev/null || return 0
    kill -0 "$pid" 2>/dev/null || break
    sleep .05
  done
  tail -n 5 "$(log_of "$name")" >&2
  die "$name did not start; see $(log_of "$name")"
}

# Cgroups: a root per node in every hierarchy (v1 or hybrid: one folder each; v2: the only one).
cgroup_hierarchies() {
  if [ -e /sys/fs/cgroup/cgroup.procs ]; then
    echo /sys/fs/cgroup
  else
    find /sys/fs/cgroup -mindepth 1 -maxdepth 1 -type d
  fi
}

delegate() { # FOLDER of cgroup v2: hand every controller down to its children
  local controllers
  controllers=$(sed 's/[^ ][^ ]*/+&/g' "$1/cgroup.controllers")
  [ -z "$controllers" ] || echo "$controllers" >"$1/cgroup.subtree_control"
}

# A node's pods go before the control plane, which on other clusters has machines of its own.
NODE_SHARES=4096 # of the CPU; a process outside counts 1024

make_cgroup() { # NAME
  local dir
  while read -r dir; do
    mkdir -p "$dir/$1"
    if [ -e "$dir/cgroup.controllers" ]; then
      delegate "$dir"
      delegate "$dir/$1"
    fi
    [ ! -e "$dir/$1/cpu.shares" ] || echo "$NODE_SHARES" >"$dir/$1/cpu.shares"
    [ ! -e "$dir/$1/cpu.weight" ] || echo $((NODE_SHARES * 100 / 1024)) >"$dir/$1/cpu.weight"
  done < <(cgroup_hierarchies)
}

our_cgroups() { cgroup_hierarchies | while read -r dir; do find "$dir" -mindepth 1 -maxdepth 1 -name "$ID-*"; done; }

remove_cgroups() {
  local left
  for _ in {1..50}; do
    mapfile -t left < <(our_cgroups)
    [ ${#left[@]} -gt 0 ] || return 0
    find "${left[@]}" -depth -type d -delete 2>/dev/null || sleep .1
  done
  die "cgroups are left: ${left[*]}"
}

# End what carries the cluster's mark and is not this script or what called it: an init that a killed `up` was about to
# start, and what a user left running in the cluster's network (`cluster run ...`), which would keep that network alive.
end_leftovers() {
  local dir pid spare=" " found=yes
  pid=$$
  while [ "$pid" -gt 1 ]; do
    spare+="$pid "
    pid=$(awk '$1 == "PPid:" {print $2}' "/proc/$pid/status")
  done
  while [ -n "$found" ]; do
    found=
    for dir in /proc/[0-9]*; do
      pid=${dir#/proc/}
      [[ $spare != *" $pid "* ]] || continue
      if { tr '\0' '\n' <"$dir/environ"; } 2>/dev/null | grep -qxF "COSERVE_CLUSTER=$ID"; then
        kill -9 "$pid" 2>/dev/null && found=yes
      fi
    done
  done
}
