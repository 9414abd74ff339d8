#!/usr/bin/env bash
# Proves that the cluster comes up from any state, runs pods, and leaves nothing behind. Needs a machine on which no
# cluster is up; ends within 90 seconds once the programs are built. usage: selftest.sh
set -euo pipefail
export BEAMLINE_CLUSTER_DIR=/tmp/beamline-selftest/cluster
unset CLUSTER
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$here/remains.sh"

namespace=selftest
outside=outside
limit=90

main() {
  require_root
  # What the machine is looked at with, before anything comes up.
  require ip=iproute2 nft=nftables
  local owner before left
  owner=$(bridge_owner)
  [[ -z $owner || $owner == "$state" ]] || die "a cluster is up: take it down first (its state is $owner)"
  PATH=$("$here/tools.sh" --path kubernetes etcd coredns nats-server):$PATH
  export KUBECONFIG=$state/kubeconfig
  "$here/down.sh" 2>/dev/null
  before=$(machine)
  output=$(mktemp)
  trap finish EXIT
  trap 'failed "not done after $limit s"' TERM
  (sleep $limit; kill $$) >/dev/null 2>&1 &
  watchdog=$!
  SECONDS=0

  step "up: interrupted, then twice at once, then once more"
  timeout --signal INT 2 "$here/up.sh" >/dev/null 2>&1 || true
  "$here/up.sh" >/dev/null 2>&1 &
  expect "the cluster is up" "$here/up.sh"
  wait $! || failed "the other up failed"
  expect "the cluster is up: node-1 Ready" "$here/up.sh"

  step "a server with a volume: logs, exec, port-forward, owner of the files"
  expect "successfully rolled out" "$here/nats.sh" $namespace
  expect "Server is ready" kubectl logs -n $namespace deployment/nats
  expect "nats-server: v" kubectl exec -n $namespace deployment/nats -- /nats-server --version
  expect "INFO {" port_forward 4222
  expect 65532 stat -c %g "$state"/volumes/*/jetstream

  step "from inside a pod: DNS, a Service, the apiserver, no way out"
  run_client
  expect "system:serviceaccount:$namespace:default" kubectl logs -n $namespace client -c whoami
  expect '"status":"ok"' kubectl logs -n $namespace client -c service
  expect "no such host" kubectl logs -n $namespace client -c name
  expect "Unable to connect" kubectl logs -n $namespace client -c address
  expect_nothing sed '/^0$/d' /sys/class/net/$outside/statistics/tx_packets

  step "a volume whose claim is gone: emptied, and available again"
  expect "deleted" kubectl delete -n $namespace -f "$here/nats/nats.yaml" --timeout 30s
  expect "the cluster is up" "$here/up.sh"
  expect_nothing kubectl get pv -o jsonpath='{.items[?(@.status.phase!="Available")].metadata.name}'
  expect_nothing find "$state/volumes" -mindepth 2

  step "kill -9 of everything beside a running pod, then up"
  expect "successfully rolled out" "$here/nats.sh" $namespace
  end_all processes "$state"
  end_all pod_processes
  [[ $(mounts "$state") && $(ip link show master $bridge) ]] || failed "nothing was left lying, so nothing was tested"
  expect "the cluster is up after" "$here/up.sh"
  expect "successfully rolled out" "$here/nats.sh" $namespace

  step "down: nothing is left"
  ip link delete $outside
  expect "the cluster is down" "$here/down.sh"
  expect "no cluster is up" "$here/down.sh"
  left=$(comm -13 <(sort <<<"$before") <(machine | sort))
  [[ ! $left ]] || failed "left on the machine: $left"
  say "passed in $SECONDS s"
}

# A pod without an image of its own: kubectl from the host, in the image that is there already. What it could send out
# would show on an interface that stands for the outside.
run_client() {
  ip link add $outside type veth peer name $outside-far
  ip link set $outside addrgenmode none up
  ip link set $outside-far up
  ip address add 198.51.100.1/24 dev $outside
  kubectl apply -n $namespace -f - >/dev/null <<EOF
apiVersion: v1
kind: Pod
metadata:
  name: client
spec:
  restartPolicy: Never
  volumes:
    - name: tools
      hostPath:
        path: $(dirname "$(type -P kubectl)")
  containers:
    - name: whoami
      image: &image $(nats_image)
      command: [/tools/kubectl, auth, whoami]
      env:
        - name: KUBERNETES_SERVICE_HOST
          value: kubernetes.default.svc
      volumeMounts: &tools
        - name: tools
          mountPath: /tools
    - name: service
      image: *image
      command: [/tools/kubectl, --server, "http://nats.$namespace.svc.cluster.local:8222", get, --raw, /healthz]
      volumeMounts: *tools
    - name: name
      image: *image
      command: [/tools/kubectl, --server, "http://example.com", get, --raw, /]
      volumeMounts: *tools
    - name: address
      image: *image
      command: [/tools/kubectl, --server, "http://198.51.100.2", --request-timeout, 2s, get, --raw, /]
      volumeMounts: *tools
EOF
  # The pod fails, since two of its containers have to; it does so when all of them have ended.
  expect "condition met" kubectl wait -n $namespace pod/client --for jsonpath='{.status.phase}'=Failed --timeout 30s
}

nats_image() { awk '$1 == "image:" { print $2 }' "$here/nats/nats.yaml"; }

# The first line that the server sends through kubectl port-forward.
port_forward() {
  local line port forward
  coproc forward { exec kubectl port-forward -n $namespace deployment/nats ":$1"; }
  read -r -t 10 line <&"${forward[0]}"
  port=${line#*127.0.0.1:}
  read -r -t 10 line <"/dev/tcp/127.0.0.1/${port%% *}"
  echo "$line"
  kill "${forward_PID:?}"
}

# All that a cluster could leave, one a line.
machine() {
  processes "$state"
  pod_processes
  awk '{ print "mount " $2 }' /proc/mounts
  ip -o link | awk '{ print "link " $2 }'
  ip route | sed 's/^/route /'
  ip netns | sed 's/^/netns /'
  nft list ruleset | sed 's/^/nft /'
  for root in $(cgroup_roots); do
    find "$root" -name '*beamline*' -o -name '*kubepods*'
  done
  sysctl -a 2>/dev/null |
    grep -E '^(vm\.(overcommit|panic)|kernel\.(panic|keys)|net\.ipv4\.ip_forward|net.*conntrack.*(max|timeout))'
  find /run/containerd /run/netns /var/lib/{cni,kubelet,containerd} /var/log/{containers,pods} /opt/c* /etc/cni \
    "${state%/*}" 2>/dev/null || true
}

step() { say "- $*"; }

# expect TEXT COMMAND…: the command succeeds, and its output has the text.
expect() {
  local text=$1
  shift
  "$@" >"$output" 2>&1 || failed "$* failed: $(tail -n 20 "$output")"
  grep -qF -- "$text" "$output" || failed "'$text' is not in the output of $*: $(tail -n 20 "$output")"
}

expect_nothing() {
  "$@" >"$output" 2>&1 || failed "$* failed: $(tail -n 20 "$output")"
  [[ ! -s $output ]] || failed "$* finds: $(tail -n 20 "$output")"
}

failed() {
  say "FAILED after $SECONDS s: $*"
  exit 1
}

finish() {
  kill "$watchdog" 2>/dev/null || true
  ip link delete $outside 2>/dev/null || true
  "$here/down.sh" >/dev/null 2>&1 || say "and down.sh failed"
  rm -rf "$output" "${state%/*}"
}

main
