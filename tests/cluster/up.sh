#!/usr/bin/env bash
# Starts the local cluster, one real Kubernetes node, or says that it is up. CLUSTER=current only checks the cluster of
# the current kubectl context. usage: up.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$here/remains.sh"
source "$here/parts.sh"

bridge_address=10.244.0.1
address=$bridge_address
api_port=6443 etcd_port=2379 peer_port=2380 manager_port=10257 scheduler_port=10259
ports=("$api_port" "$etcd_port" "$peer_port" "$manager_port" "$scheduler_port" 10248 10249 10250 10256)
volumes=64

main() {
  if uses_current_context; then
    check_current_context
    exit
  fi
  require_root
  [[ $state =~ ^/[A-Za-z0-9/._+@-]+$ ]] || die "the state directory must be a plain absolute path, not $state"
  require ctr=containerd runc=runc ip=iproute2 nft=nftables sysctl=procps
  require_cni
  local tools
  tools=$("$here/tools.sh" --path kubernetes etcd coredns)
  export PATH=$tools:$PATH KUBECONFIG=$state/kubeconfig
  pause_archive=$(image_archive localhost/pause:1 "$here/pause" compile_pause)

  lock_machine
  if is_complete; then
    cd "$state"
    wait_for kubelet node_is_ready
    free_volumes
    say "the cluster is up: $(kubectl get nodes --no-headers | awk '{ print $1, $2, $5 }')"
  else
    SECONDS=0
    clear_remains
    start
    say "the cluster is up after ${SECONDS} s; to use it: export KUBECONFIG=$KUBECONFIG"
  fi
}

check_current_context() {
  local context
  type -P kubectl >/dev/null || die "kubectl is missing: CLUSTER=current needs it in PATH"
  context=$(kubectl config current-context 2>/dev/null) || die "kubectl has no current context"
  kubectl --request-timeout 10s get --raw /version >/dev/null || die "the cluster of context $context does not answer"
  say "using the cluster of context $context"
}

require_cni() {
  for cni in /usr/lib/cni /opt/cni/bin; do
    [[ ! -x $cni/bridge ]] || return 0
  done
  cni=/usr/lib/cni
  require $cni/bridge=containernetworking-plugins
}

compile_pause() {
  require musl-gcc=musl-tools
  musl-gcc -Os -static -o "$1/pause" "$1/pause.c"
}

# True when every part runs and an earlier call has started them all.
is_complete() {
  local running daemon
  [[ -e $state/complete ]] || return 1
  running=$(processes "$state")$'\n'
  for daemon in "${daemons[@]}"; do
    [[ $running == *" $daemon"$'\n'* ]] || { say "$daemon does not run: starting afresh"; return 1; }
  done
}

clear_remains() {
  local owner
  owner=$(bridge_owner)
  if [[ $owner && $owner != "$state" ]]; then
    [[ -z $(processes "$owner") ]] || die "another cluster is up: BEAMLINE_CLUSTER_DIR=$owner $here/down.sh ends it"
    clear_cluster "$owner"
  fi
  clear_cluster "$state"
}

start() {
  check_ports
  mkdir -p "$state"
  chmod 755 "$state"
  cd "$state"
  mkdir -p log etc volumes
  make_network
  make_cgroups
  # The kubelet changes these.
  sysctl vm.overcommit_memory kernel.panic kernel.panic_on_oops >sysctls
  write_config
  start_containerd
  # Autoscaling at the speed of tests, unless its own is what is measured.
  manager_options=(--horizontal-pod-autoscaler-sync-period "${AUTOSCALER_SYNC:-2s}" --horizontal-pod-autoscaler-downscale-stabilization 5s)
  start_control_plane
  start_node
  kubectl create -f etc/base.yaml >log/base.log 2>&1 || fail base "cannot create storage and roles"
  wait_for containerd ctr -a containerd.sock version
  ctr -a containerd.sock -n k8s.io images import "$pause_archive" >/dev/null
  wait_for coredns accepts $bridge_address 53
  wait_for kubelet node_is_ready
  wait_for kube-controller-manager kubectl get serviceaccount default
  touch complete
}

check_ports() {
  local filter listener
  filter=$(printf 'or sport = :%s ' "${ports[@]}")
  listener=$(ss -Hltnp "${filter#or }" | head -n 1)
  [[ -z $listener ]] || die "port $(awk '{ sub(/.*:/, "", $4); print $4 }' <<<"$listener") is taken by" \
    "$(sed -n 's/.*(("\([^"]*\)",pid=\([0-9]*\).*/\1 (process \2)/p' <<<"$listener")"
}

make_network() {
  [[ -e /proc/sys/net/bridge ]] || { require modprobe=kmod && modprobe br_netfilter; } ||
    die "the kernel module br_netfilter is missing: without it a pod does not reach a Service of a pod beside it"
  # The route: else a service address that kube-proxy does not know yet would follow the default route.
  ip -batch - <<EOF
link add $bridge type bridge nf_call_iptables 1
link set $bridge alias $state up
address add $bridge_address/24 dev $bridge
route add $services dev $bridge
EOF
  sysctl -qw net.ipv4.conf.$bridge.forwarding=1
  nft -f "$here/config/network.nft"
  open_firewall -I
}

make_cgroups() {
  local root controllers controller
  for root in $(cgroup_roots); do
    mkdir -p "$root/beamline" || die "cannot create cgroups (in a container? it must be privileged)"
    [[ -e $root/cgroup.controllers ]] || continue # version 1
    read -ra controllers <"$root/cgroup.controllers"
    for controller in "${controllers[@]}"; do
      echo "+$controller" >"$root/cgroup.subtree_control" || true
    done
  done
}

write_config() {
  local user name
  cp -r "$here/config/." etc
  for ((i = 1; i <= volumes; i++)); do
    name=local-$i
    mkdir -m 777 "volumes/$name"
    sed "s|@NAME@|$name|" etc/volume.yaml >>etc/base.yaml
  done
  sed -i "s|@STATE@|$state|g; s|@CNI@|$cni|" etc/{*.yaml,containerd.toml,Corefile,cni/*}
  make_certificates
  for user in kube-proxy coredns; do
    kubeadm kubeconfig user --config etc/kubeadm.yaml --client-name system:$user >etc/$user.conf 2>>log/kubeadm.log ||
      fail kubeadm "cannot create the kubeconfig of $user"
  done
  [[ ! ${SUDO_UID:-} ]] || chown "$SUDO_UID" kubeconfig
}

start_containerd() {
  # A proxy that nobody runs: an image that was not loaded fails at once instead of being pulled.
  run containerd env HTTP_PROXY=http://127.0.0.1:9 HTTPS_PROXY=http://127.0.0.1:9 \
    containerd --config etc/containerd.toml
}

start_node() {
  run kubelet kubelet --config etc/kubelet.yaml --kubeconfig etc/kubelet.conf --root-dir "$state/kubelet" \
    --cert-dir kubelet/pki --hostname-override node-1 --node-ip $bridge_address
  run kube-proxy kube-proxy --config etc/kube-proxy.yaml
  run coredns coredns -conf etc/Corefile
}

node_is_ready() { [[ $(kubectl get node node-1 --no-headers) == "node-1 "*" Ready "* ]]; }

accepts() { (: <"/dev/tcp/$1/$2"); }

# Volumes whose claim is gone are emptied, and can be claimed again.
free_volumes() {
  local volume
  kubectl get pv -o jsonpath='{range .items[?(@.status.phase=="Released")]}{.metadata.name}{"\n"}{end}' |
    while read -r volume; do
      [[ -d volumes/$volume ]] || continue
      find "volumes/$volume" -mindepth 1 -delete
      chown root:root "volumes/$volume"
      chmod 777 "volumes/$volume"
      kubectl patch pv "$volume" --type json -p '[{"op": "remove", "path": "/spec/claimRef"}]' >/dev/null
    done
}

main
