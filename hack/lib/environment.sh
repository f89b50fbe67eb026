# What people and tests run against the cluster: commands in its network, and the Python packages that agent pods mount.
# shellcheck shell=bash

run_verb() { # CMD...
  need_root run
  [ $# -gt 0 ] || die "run needs a command"
  local pid
  pid=$(find_process init) || die "no cluster is up here ($STATE); start it with: $0 up"
  PATH=$BIN:$PATH KUBECONFIG=$KUBECONFIG_FILE COSERVE_CLUSTER=$ID exec nsenter -t "$pid" --net -- "$@"
}

node_verb() { # NODE CMD...
  need_root node
  [ $# -gt 1 ] || die "node needs a node and a command"
  local node=$1
  shift
  enter "init/$node" "$@"
}

env_verb() {
  local name
  mkdir -p "$STATE/bin"
  for name in kubectl helm; do # reach the cluster from any shell, whose network is not the cluster's
    # shellcheck disable=SC2016
    printf '#!/usr/bin/env bash\nCOSERVE_CLUSTER_STATE=%q COSERVE_CACHE=%q exec %q run %q "$@"\n' \
      "$STATE" "$CACHE" "$HACK/cluster" "$BIN/$name" >"$STATE/bin/$name"
    chmod +x "$STATE/bin/$name"
  done
  # shellcheck disable=SC2016
  printf 'export KUBECONFIG=%q\nexport PATH=%q:%q:"$PATH"\n' "$KUBECONFIG_FILE" "$STATE/bin" "$BIN"
}

# DIR: DIR/site-packages holds what requirements/agent.txt names, resolved for the base image's Python; DIR/coserve
# our packages. Both go on a pod's PYTHONPATH. Files are links into uv's cache where possible, so mount DIR read-only.
POD_PYTHON=3.11.2

pod_packages() { # the folder of requirements/agent.txt's packages in the cache
  echo "$CACHE/pod-env-$POD_PYTHON-compiled-$(sha256sum <"$ROOT/requirements/agent.txt" | cut -c1-12)"
}

pod_env() {
  [ $# = 1 ] || die "pod-env needs a folder"
  local dir cached uv
  dir=$(realpath -m "$1")
  cached=$(pod_packages)
  if [ ! -d "$cached" ]; then
    uv=$(uv_program)
    (
      lock "pod-env" "$CACHE/pod-env.lock"
      [ ! -d "$cached" ] || exit 0
      rm -rf "$cached.part"
      progress "installing the agent's packages for Python $POD_PYTHON (4.5 GB; seconds when uv has them cached)" \
        "$CACHE/log/pod-env.log" \
        nice -n 5 "$uv" pip install --compile-bytecode --require-hashes --link-mode hardlink \
        --python-version "$POD_PYTHON" \
        --python-platform "$(uname -m)-manylinux_2_36" --target "$cached.part" -r "$ROOT/requirements/agent.txt"
      mv "$cached.part" "$cached"
    )
  fi
  mkdir -p "$dir"
  if [ "$(cat "$dir/.made-from" 2>/dev/null)" != "$cached" ]; then
    rm -rf "$dir/site-packages"
    cp -al "$cached" "$dir/site-packages" 2>/dev/null || cp -a "$cached" "$dir/site-packages"
    echo "$cached" >"$dir/.made-from"
  fi
  rm -rf "$dir/coserve.part"
  "$(uv_program)" pip install -q --no-deps --build-constraints "$HACK/build-requirements.txt" --compile-bytecode --python-version "$POD_PYTHON" \
    --target "$dir/coserve.part" "$ROOT"
  rm -rf "$dir/coserve"
  mv "$dir/coserve.part" "$dir/coserve"
  say "in the pod: PYTHONPATH=<mount>/coserve:<mount>/site-packages"
}
