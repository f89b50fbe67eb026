# Images without a registry: a base made by debootstrap, the Dockerfile built by buildah, and the way into the nodes.
# shellcheck shell=bash

BASE=localhost/coserve-base:dev
export BUILDAH_ISOLATION=chroot

pause_image() ( # what holds a pod's namespaces: catatonit, which is statically linked
  [ ! -f "$CACHE/pause.tar" ] || exit 0
  lock "making of the pause image" "$CACHE/pause.lock"
  container=$(buildah from scratch)
  buildah add -q "$container" "$(command -v catatonit)" /pause >/dev/null
  buildah config --entrypoint '["/pause", "-P"]' "$container"
  buildah commit -q --rm "$container" localhost/pause:dev >/dev/null
  archive localhost/pause:dev "$CACHE/pause.tar"
)

archive() { # IMAGE FILE: not an oci-archive, whose compression takes longer than all the rest
  mkdir -p "$(dirname "$2")"
  rm -f "$2.part"
  buildah push -q "$1" "docker-archive:$2.part:$1"
  mv "$2.part" "$2"
}

debootstrap_base() { # FILE
  local dir container
  rm -rf "$CACHE"/base.?????? # of an interrupted run
  dir=$(mktemp -d "$CACHE/base.XXXXXX")
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,redis-server bookworm "$dir/root" \
    ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
  rm -rf "$dir"/root/var/cache/apt/archives/*.deb "$dir"/root/var/lib/apt/lists/*
  echo 'coserve:x:65532:65532::/tmp:/usr/sbin/nologin' >>"$dir/root/etc/passwd"
  echo 'coserve:x:65532:' >>"$dir/root/etc/group"
  chmod 755 "$dir/root"
  container=$(buildah from scratch)
  buildah add -q "$container" "$dir/root" /
  buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --user 65532:65532 "$container"
  buildah commit -q --rm "$container" "$BASE"
  image_id "$BASE" >"$1.id"
  archive "$BASE" "$1"
  rm -rf "$dir"
}

image_id() { buildah inspect --type image --format 'sha256:{{.FromImageID}}' "$1" 2>/dev/null; }

base_file() { echo "$CACHE/base-$(declare -f debootstrap_base | sha256sum | cut -c1-12).tar"; }

base_image() {
  local file
  file=$(base_file)
  if [ ! -f "$file" ]; then
    (
      lock "making of the base image" "$CACHE/base.lock"
      [ -f "$file" ] || progress "making the base image: Debian bookworm with Python and Redis (about 2 minutes)" \
        "$CACHE/log/base.log" nice -n 5 "$HACK/cluster" internal debootstrap_base "$file"
    )
  fi
  [ "$(image_id "$BASE")" = "$(cat "$file.id")" ] || progress "importing the base image" "$CACHE/log/base.log" \
    buildah pull "docker-archive:$file"
}

# TARGET: one of the Dockerfile's. Dependencies are a layer of their own, so a change of our source takes seconds.
project_image() (
  # How this machine reaches PyPI (an index, a proxy's certificate) goes in as build secrets: none of it stays.
  secrets=$(mktemp -d)
  trap 'rm -rf "$secrets"' EXIT
  python3 "$HACK/lib/pip_settings.py" "$secrets"
  progress "building localhost/coserve-$1:dev" "$CACHE/log/image-$1.log" nice -n 5 buildah build --layers \
    --build-arg "BASE=$BASE" --target "$1" --tag "localhost/coserve-$1:dev" --file "$ROOT/Dockerfile" \
    --secret "id=pip.conf,src=$secrets/pip.conf" --secret "id=ca.crt,src=$secrets/ca.crt" "$ROOT"
)

images() { # [NAME...]
  local name
  need_root images
  [ $# -gt 0 ] || set -- redis agent-dev operator
  base_image
  for name; do
    case "$name" in
      base) ;;
      redis | agent-dev) buildah tag "$BASE" "localhost/coserve-$name:dev" ;;
      operator | agent) project_image "$name" ;;
      *) die "images are base, redis, agent-dev, operator and agent, not '$name'" ;;
    esac
  done
}

import_images() { # NODE FILE
  enter "init/$1" ctr -n k8s.io images import "$2" >/dev/null
}

load() { # IMAGE...: from buildah's store to every node
  local image id node file names
  need_root load
  running || die "no cluster is up here ($STATE); start it with: $0 up"
  for image; do
    [[ $image == */* ]] || image=localhost/coserve-$image
    [[ ${image##*/} == *:* ]] || image=$image:dev
    id=$(image_id "$image") || true
    [ -n "$id" ] || die "no image $image in buildah's store; '$0 images' builds the project's"
    file=
    for node in $(nodes); do
      names=$(enter "init/$node" ctr -n k8s.io images ls -q)
      if grep -qx "$id" <<<"$names"; then # its content is there already, under this or another name
        enter "init/$node" ctr -n k8s.io images tag --force "$id" "$image" >/dev/null
        continue
      fi
      if [ -z "$file" ]; then
        file=$(mktemp -u "$STATE/image.XXXXXX.tar")
        progress "exporting $image" "$LOGS/load.log" archive "$image" "$file"
      fi
      progress "importing $image into $node" "$LOGS/load.log" import_images "$node" "$file"
    done
    [ -z "$file" ] || rm -f "$file"
  done
}
