#!/usr/bin/env bash
# Runs a NATS server with JetStream in a namespace of the cluster, and waits until it is ready. usage: nats.sh NAMESPACE
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  (($# == 1)) || die "usage: $0 NAMESPACE"
  local namespace=$1 version archive
  KUBECONFIG=$("$here/kubeconfig.sh")
  export KUBECONFIG
  uses_current_context || PATH=$("$here/tools.sh" --path kubernetes):$PATH
  nats_server=$("$here/tools.sh" --path nats-server)/nats-server
  version=$(pinned nats-server github.com/nats-io/nats-server/v2)
  archive=$(image_archive "localhost/nats-server:${version#v}" "$here/nats" copy_nats_server)
  "$here/load-image.sh" "$archive"
  kubectl get namespace "$namespace" >/dev/null 2>&1 || kubectl create namespace "$namespace"
  kubectl apply -n "$namespace" -f "$here/nats/nats.yaml"
  kubectl rollout status -n "$namespace" deployment/nats --timeout 60s
}

copy_nats_server() { cp "$nats_server" "$1"; }

main "$@"
