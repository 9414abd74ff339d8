#!/usr/bin/env bash
# From nothing to a WorkerPool at work: builds, cluster, NATS, chart, assignments of every block, from no worker to many and
# back, a killed pod.
# CLUSTER=current uses the current kubectl context instead of a cluster of its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cluster/lib.sh"

cd "$here/../.."
namespace=beamline-demo
begun=$SECONDS
columns=READY:.status.readyReplicas,DESIRED:.status.desiredReplicas,DEPTH:.status.queue.depth,REASON:.status.scaling.reason
look="kubectl -n $namespace get workerpool demo --no-headers -o custom-columns=$columns"

main() {
  step "Building the programs and their images"
  require_rust
  require cc=gcc
  tests/image.sh beamline "${PROFILE:-fast}"
  tests/image.sh peer "${PROFILE:-fast}"
  cargo_build "building the demo's Router" --workspace --bins
  uses_current_context || PATH=$(tests/cluster/tools.sh --path kubernetes helm):$PATH

  step "Bringing the cluster up"
  tests/cluster/up.sh
  KUBECONFIG=$(tests/cluster/kubeconfig.sh)
  export KUBECONFIG
  tests/cluster/load-image.sh target/image/*.tar

  step "NATS with JetStream (namespace nats)"
  quietly tests/cluster/nats.sh nats

  step "The operator: helm install beamline charts/beamline --namespace beamline-system"
  quietly helm upgrade --install beamline charts/beamline --namespace beamline-system --create-namespace \
    --wait --timeout 2m
  # The same version may have been built anew.
  quietly kubectl -n beamline-system rollout restart deployment/beamline
  quietly kubectl -n beamline-system rollout status deployment/beamline --timeout 60s

  step "A WorkerPool, and no worker while there is no work: kubectl apply -f tests/demo/workerpool.yaml"
  kubectl get namespace $namespace >/dev/null 2>&1 || quietly kubectl create namespace $namespace
  quietly kubectl apply -n $namespace -f tests/demo/peer.yaml -f tests/demo/workerpool.yaml
  quietly kubectl -n $namespace rollout status deployment/peer --timeout 60s
  quietly kubectl -n $namespace wait workerpool/demo --for=condition=Ready --timeout 90s
  show_pool

  step "Assignments of every block, as a Router sends them: the first one wakes the pool"
  forward_nats
  demo_router blocks

  step "A backlog of 4000: how many workers are ready and asked for, how many assignments wait or run, and why"
  demo_router backlog --watch "$look"

  step "200 slow assignments; a worker pod is killed in the middle"
  demo_router storm --kill "kubectl -n $namespace delete pod --grace-period=0 --force --wait=false $(a_worker)"

  step "Nothing is left to do: the workers go"
  until_nobody_is_left
  show_pool

  step "What the operator has decided, and why: kubectl -n $namespace get events"
  show_decisions

  what_next
}

step() { printf '\n[%3ds] %s\n' $((SECONDS - begun)) "$*"; }

# A command's words matter only when it fails.
quietly() {
  local output
  output=$("$@" 2>&1) || { printf '%s\n' "$output" >&2; die "failed: $*"; }
}

# Says how things stand each time that it is something else.
until_nobody_is_left() {
  local now before=''
  for ((i = 0; i < 120; i++)); do
    now=$($look)
    [[ $now == "$before" ]] || echo "  $now"
    [[ ! $now =~ ^0\ +0\  ]] || return 0
    before=$now
    sleep 0.5
  done
  die "workers stay though nothing is left to do"
}

show_decisions() {
  kubectl -n $namespace get events --sort-by=.metadata.creationTimestamp \
    -o jsonpath='{range .items[?(@.involvedObject.kind=="WorkerPool")]}{.reason} {.message}{"\n"}{end}' |
    sed -n 's/^\(Scaled[A-Z][a-z]*\) \(.*\)/  \1  \2/p'
}

show_pool() { kubectl -n $namespace get workerpools; }

a_worker() {
  kubectl -n $namespace get pods -l beamline.dev/pool=demo --field-selector status.phase=Running \
    -o jsonpath='{.items[0].metadata.name}'
}

# The same way in for every cluster: through its API server.
forward_nats() {
  local log
  log=$(mktemp)
  kubectl -n nats port-forward deployment/nats :4222 >"$log" 2>&1 &
  forwarder=$!
  trap 'kill $forwarder 2>/dev/null || true' EXIT
  for _ in $(seq 100); do
    nats_port=$(sed -n 's/^Forwarding from 127.0.0.1:\([0-9]*\).*/\1/p' "$log")
    [[ ! $nats_port ]] || break
    sleep 0.1
  done
  rm -f "$log"
  [[ $nats_port ]] || die "kubectl port-forward to NATS does not come up"
}

demo_router() { target/debug/demo --nats-url "nats://127.0.0.1:$nats_port" "$@"; }

what_next() {
  step "Done. It stays up. What to try next:"
  uses_current_context ||
    echo "  export KUBECONFIG=$KUBECONFIG PATH=$(tests/cluster/tools.sh --path kubernetes helm):\$PATH"
  hint "kubectl -n $namespace get workerpools -w" "the queue as it moves"
  hint "kubectl -n $namespace get workerpool demo -o yaml" "the whole status, with the reason of each decision"
  echo "  kubectl -n $namespace patch workerpool demo --type merge -p '{\"spec\":{\"replicas\":2,\"scaling\":{\"mode\":\"Manual\"}}}'"
  hint "kubectl -n $namespace scale workerpool demo --replicas 3" "now a person decides"
  hint "kubectl explain workerpool.spec" "the manual"
  hint "kubectl -n $namespace logs -l beamline.dev/pool=demo -f" "what workers say"
  hint "kubectl -n nats port-forward deployment/nats 4222 &" "a way in, then:"
  echo "  target/debug/demo --nats-url nats://127.0.0.1:4222 storm"
  uses_current_context || hint "make cluster-down" "leaves nothing behind"
}

hint() { printf '  %-60s # %s\n' "$1" "$2"; }

main "$@"
