#!/usr/bin/env bash
# Starts a control plane without a kubelet, as many side by side as the machine carries: etcd, API server with an audit
# log, controller manager, scheduler, and kwok, which says of every pod that it runs, unless its image is one of
# nowhere/. Prints the directory with kubeconfig, audit.log and log/ when it is ready. When its standard input ends, all of
# it ends and is removed.
# usage: control-plane.sh API_PORT ETCD_PORT PEER_PORT
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$here/parts.sh"

# Of an API server that only this machine reaches. Another address than loopback: the Service `kubernetes` needs one.
address=10.244.0.1
# Nobody asks the controller manager and the scheduler anything.
manager_port=0 scheduler_port=0
nodes=4

main() {
  (($# == 3)) || die "usage: $0 API_PORT ETCD_PORT PEER_PORT"
  api_port=$1 etcd_port=$2 peer_port=$3
  PATH=$("$here/tools.sh" --path kubernetes etcd kwok):$PATH
  state=$(mktemp -d)
  trap end EXIT
  export KUBECONFIG=$state/kubeconfig
  cd "$state"
  mkdir -p log etc
  cp "$here"/config/kubeadm.yaml "$here"/plane/*.yaml etc
  make_certificates
  # They would use the address that is advertised.
  sed -i "s|https://$address:|https://127.0.0.1:|" etc/*.conf
  # The API server reaches what serves further APIs by name, and not by the endpoints of a Service, which no test has.
  api_options=(--bind-address 127.0.0.1 --enable-aggregator-routing=false --audit-policy-file etc/audit.yaml --audit-log-path audit.log)
  # As many pools come at once as a bench likes.
  manager_options=(--kube-api-qps 500 --kube-api-burst 1000 --concurrent-gc-syncs 50
    --horizontal-pod-autoscaler-sync-period 1s)
  start_control_plane
  for ((i = 1; i <= nodes; i++)); do
    echo ---
    sed "s|@NAME@|fake-$i|" etc/node.yaml
  done >etc/nodes.yaml
  kubectl create -f etc/nodes.yaml >log/nodes.log 2>&1 || fail nodes "cannot create nodes"
  run kwok kwok --kubeconfig kubeconfig --config "$(dirname "$(type -P kwok)")/stages.yaml" --config etc/stages.yaml \
    --manage-all-nodes --node-lease-duration-seconds 40
  wait_for kwok kubectl wait --for=condition=Ready nodes --all --timeout=5s
  wait_for kube-controller-manager kubectl get serviceaccount default
  echo "$state"
  # Until whoever wanted it has gone.
  cat >/dev/null
}

end() {
  # Without a line for each that it was killed.
  { ((${#started[@]} == 0)) || kill -9 "${started[@]}" || true; wait; } 2>/dev/null
  rm -rf "$state"
}

main "$@"
