#!/usr/bin/env bash
# Makes the images in archives (OCI or Docker) known to the cluster. usage: load-image.sh ARCHIVE.tar…
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  (($#)) || die "usage: $0 ARCHIVE.tar…"
  local archive
  for archive; do
    [[ -r $archive ]] || die "there is no archive $archive"
    if uses_current_context; then
      load_into_current "$archive"
    else
      load "$archive"
    fi
  done
}

load() {
  require_root
  require jq=jq
  [[ -e $state/complete ]] || die "no cluster is up: make cluster-up"
  if is_loaded "$1"; then
    say "loaded already: $1"
    return
  fi
  ctr images import "$1" >/dev/null || die "cannot import $1"
  say "loaded $1"
}

ctr() { command ctr -a "$state/containerd.sock" -n k8s.io "$@"; }

# True when the cluster has every image of an OCI archive, with the same digest.
is_loaded() {
  local known wanted
  known=$(ctr images list | awk 'NR > 1 { print $1, $3 }')
  wanted=$(tar -xOf "$1" index.json 2>/dev/null | jq -r '.manifests[] | "\(.annotations
    | .["io.containerd.image.name"] // .["org.opencontainers.image.ref.name"]) \(.digest)"') || return 1
  [[ $wanted ]] && ! grep -qvxFf <(echo "$known") <<<"$wanted"
}

load_into_current() {
  local archive=$1 context command
  context=$(kubectl config current-context)
  case $context in
    kind-*) command=(kind load image-archive "$archive" --name "${context#kind-}") ;;
    k3d-*) command=(k3d image import "$archive" --cluster "${context#k3d-}") ;;
    minikube) command=(minikube image load "$archive") ;;
    *) die "cannot load an image into $context: push it to a registry that the cluster can pull from" ;;
  esac
  type -P "${command[0]}" >/dev/null || die "${command[0]} is missing; with it: ${command[*]}"
  "${command[@]}"
}

main "$@"
