#!/usr/bin/env bash
# Prints the path of the cluster's kubeconfig: export KUBECONFIG=$(tests/cluster/kubeconfig.sh)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if uses_current_context; then
  echo "${KUBECONFIG:-$HOME/.kube/config}"
  exit
fi
[[ -e $state/complete ]] || die "no cluster is up: make cluster-up"
echo "$state/kubeconfig"
