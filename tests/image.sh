#!/usr/bin/env bash
# Builds programs for an image, and from them its OCI archive in target/image/.
# usage: image.sh programs|beamline|peer [PROFILE]   (release, or fast: for tests, no link-time optimisation)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
what=${1:?programs, beamline or peer} profile=${2:-release}
triple=$(uname -m)-unknown-linux-musl
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

# What the Dockerfile copies.
programs() {
  [[ -r /etc/ssl/certs/ca-certificates.crt ]] || require update-ca-certificates=ca-certificates
  build -p beamline-worker -p beamline-operator
  stage target/image/context beamline_worker beamline-operator
  ! grep -q BEAMLINE_FAILPOINTS target/image/context/* || die "the worker of the image has fail-points"
  install -m 644 /etc/ssl/certs/ca-certificates.crt target/image/context/
}

peer() {
  build -p beamline-tests --bin peer
  stage target/image/peer peer
  cp tests/peer/Dockerfile target/image/peer/
}

# Static programs: an image from scratch has no libraries. For another target than all else, so what cargo makes of the
# selection is built once in any case.
build() {
  require_rust
  require cc=gcc musl-gcc=musl-tools
  rustc --print target-libdir --target "$triple" 2>/dev/null | xargs -r test -d || rustup target add "$triple" ||
    die "Rust's target $triple is missing: rustup target add $triple"
  export "CC_${triple//-/_}=musl-gcc"
  cargo_build "building $what ($profile)" --profile="$profile" --target="$triple" "$@"
}

stage() {
  local context=$1 program
  shift
  mkdir -p "$context"
  for program; do
    install -m 755 "target/$triple/$profile/$program" "$context/"
  done
}

archive() {
  build_archive "$1" "$3" "$PWD/target/image/$2.tar"
  say "target/image/$2.tar: $1, $(du -h "target/image/$2.tar" | cut -f1)"
}

case $what in
  programs) programs ;;
  beamline) programs && archive "ghcr.io/beamline/beamline:$version" beamline . ;;
  peer) peer && archive "localhost/beamline-peer:$version" beamline-peer target/image/peer ;;
  *) die "there is no image $what: choose from programs, beamline, peer" ;;
esac
