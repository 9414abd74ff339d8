#!/usr/bin/env bash
# Builds programs for an image, and from them its OCI archive in target/image/.
# usage: image.sh programs|beamline|peer [PROFILE]   (release, or fast: for tests, no link-time optimisation)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster/lib.sh"

cd "$here/../.."
what=${1:?programs, beamline or peer} profile=${2:-release}
triple=$(uname -m)-unknown-linux-musl
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

# What the Dockerfile copies.
programs() {
  [[ -r /etc/ssl/certs/ca-certificates.crt ]] || require update-ca-certificates=ca-certificates
  build -p beamline-worker -p beamline-operator
  stage target/image/context beamline_worker beamline-operator
  install -m 644 /etc/ssl/certs/ca-certificates.crt target/image/context/
}

peer() {
  build -p beamline-tests --bin peer
  stage target/image/peer peer
  cp tests/peer/Dockerfile target/image/peer/
}

# Static programs: an image from scratch has no libraries.
build() {
  require cc=gcc musl-gcc=musl-tools
  rustc --print target-libdir --target "$triple" 2>/dev/null | xargs -r test -d || rustup target add "$triple" ||
    die "Rust's target $triple is missing: rustup target add $triple"
  env "CC_${triple//-/_}=musl-gcc" cargo build --profile "$profile" --target "$triple" "$@"
}

stage() {
  local context=$1 program
  shift
  mkdir -p "$context"
  for program; do
    install -m 755 "target/$triple/$profile/$program" "$context/"
  done
}

# archive REFERENCE NAME CONTEXT: a store of its own, so that nothing stays behind; a fixed time, so that the same
# programs have the same digest.
archive() {
  local temp
  require buildah=buildah
  temp=$(mktemp -d "$PWD/target/image/.build.XXXXXX")
  # shellcheck disable=SC2064  # the name is known now
  trap "rm -rf '$temp'" EXIT
  buildah --root "$temp/store" --runroot "$temp/run" --storage-driver vfs build --isolation chroot --quiet \
    --timestamp 0 -t "oci-archive:$temp/image.tar:$1" "$3" >/dev/null
  mv "$temp/image.tar" "target/image/$2.tar"
  say "target/image/$2.tar: $1, $(du -h "target/image/$2.tar" | cut -f1)"
}

case $what in
  programs) programs ;;
  beamline) programs && archive "ghcr.io/beamline/beamline:$version" beamline . ;;
  peer) peer && archive "localhost/beamline-peer:$version" beamline-peer target/image/peer ;;
  *) die "there is no image $what: choose from programs, beamline, peer" ;;
esac
