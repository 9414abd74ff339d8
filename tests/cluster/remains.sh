# Finds and removes what a cluster has on this machine, dead or alive. Nothing here trusts a pid file: a process is ours
# by its program and working directory, a pod's by its cgroup, a mount by its path, and the bridge by its alias.
# shellcheck shell=bash

PATH=$PATH:/usr/sbin:/sbin
bridge=beamline0
daemons=(etcd kube-apiserver kube-controller-manager kube-scheduler containerd kubelet kube-proxy coredns)

# clear_cluster STATE_DIR: ends the cluster and leaves the machine as it was before.
clear_cluster() {
  end_all processes "$1"
  # The bridge is made first and removed last: as long as it is there, so may be the rest.
  [[ $(bridge_owner) != "$1" ]] || clear_machine
  clear_state "$1"
}

clear_machine() {
  local link root
  end_all pod_processes
  for link in $(ip -o link show master $bridge | awk -F'[ @:]+' '{ print $2 }'); do
    ip link delete "$link" 2>/dev/null || true
  done
  nft delete table inet beamline 2>/dev/null || true
  nft delete table ip kube-proxy 2>/dev/null || true
  nft delete table ip6 kube-proxy 2>/dev/null || true
  open_firewall -D
  for root in $(cgroup_roots); do
    remove_cgroup "$root/beamline"
  done
  ip link delete $bridge
}

clear_state() {
  local dir=$1 mount
  [[ -d $dir ]] || return 0
  mounts "$dir" | while read -r mount; do umount -l "$(printf '%b' "$mount")" || true; done
  # A mount may lead out of the directory, to what is not ours to remove.
  [[ -z $(mounts "$dir") ]] || die "cannot unmount $(mounts "$dir" | head -n 1)"
  [[ ! -e $dir/sysctls ]] || sysctl -qp "$dir/sysctls"
  clear_fixed_places "$dir"
  rm -rf --one-file-system "$dir"
}

# Files in places that containerd, its CNI library and the kubelet do not let us choose.
clear_fixed_places() {
  local dir=$1 result id
  [[ ! -d $dir/containerd/state ]] || find "$dir/containerd/state" -path '*/k8s.io/*' -name address -print0 |
    xargs -0 -r sed 's|^unix://||' | xargs -r rm -f
  find /var/log/containers -lname "$dir/*" -delete 2>/dev/null || true
  for result in /var/lib/cni/results/beamline-*; do
    id=${result#*/beamline-}
    id=${id%-eth0}
    rm -f "$result" "/var/lib/cni/results/cni-loopback-$id-lo"
  done
  rm -f /var/lib/kubelet/device-plugins/kubelet{.sock,_internal_checkpoint}
  rmdir -p --ignore-fail-on-non-empty /run/containerd/s /var/log/containers /var/lib/cni/results \
    /var/lib/kubelet/device-plugins 2>/dev/null || true
}

# "PID PROGRAM" of every process of the cluster in $1.
processes() {
  local proc program
  find /proc/[0-9]*/cwd -maxdepth 0 \( -lname "$1" -o -lname "$1 (deleted)" -o -lname "$1/containerd/*" \) \
    -printf '%h\n' 2>/dev/null | while read -r proc; do
    program=$(readlink "$proc/exe") || continue
    program=${program##*/}
    program=${program% (deleted)}
    case " ${daemons[*]} containerd-shim-runc-v2 runc " in
      *" $program "*) echo "${proc#/proc/} $program" ;;
    esac
  done || true
}

pod_processes() {
  local root
  for root in $(cgroup_roots); do
    find "$root/beamline" -name cgroup.procs -exec cat {} + 2>/dev/null || true
  done | grep -vx 0 | sort -u || true
}

# end_all LIST…: kills what the command lists until it lists nothing.
end_all() {
  local ids
  for _ in {1..200}; do
    mapfile -t ids < <("$@" | cut -d ' ' -f 1)
    ((${#ids[@]})) || return 0
    kill -9 "${ids[@]}" 2>/dev/null || true
    sleep 0.05
  done
  die "these processes do not end: ${ids[*]}"
}

mounts() { awk -v dir="$1/" 'index($2, dir) == 1 { print $2 }' /proc/mounts | sort -r; }

# The state directory of the cluster that made the bridge; nothing if there is no bridge.
bridge_owner() { ip -o link show $bridge 2>/dev/null | sed -n 's/.*alias \([^ \\]*\).*/\1/p' || true; }

# One hierarchy in version 2; one for each controller in version 1, and then often one of version 2 beside them.
cgroup_roots() { awk '$2 ~ "^/sys/fs/cgroup" && $3 ~ /^cgroup2?$/ { print $2 }' /proc/mounts; }

# A killed process leaves its cgroup a moment later.
remove_cgroup() {
  for _ in {1..100}; do
    find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
    [[ -d $1 ]] || return 0
    sleep 0.05
  done
  die "cannot remove the cgroup $1"
}

# open_firewall -I|-D: where a firewall drops by default (Docker, ufw), lets pods reach each other and the host.
open_firewall() {
  local rules
  rules=$(iptables-save -t filter 2>/dev/null) || return 0
  if [[ $1 == -D ]]; then
    [[ $rules != *"-A INPUT -i $bridge -j ACCEPT"* ]] || iptables -D INPUT -i $bridge -j ACCEPT
    [[ $rules != *"-A FORWARD -i $bridge -o $bridge -j ACCEPT"* ]] ||
      iptables -D FORWARD -i $bridge -o $bridge -j ACCEPT
  else
    [[ $rules != *":INPUT DROP"* ]] || iptables -I INPUT -i $bridge -j ACCEPT
    [[ $rules != *":FORWARD DROP"* ]] || iptables -I FORWARD -i $bridge -o $bridge -j ACCEPT
  fi
}
