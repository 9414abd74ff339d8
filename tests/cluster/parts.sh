# The parts of a control plane, for up.sh and control-plane.sh, and how a part is started and waited for. Whoever sources
# this is in the directory `state`, where logs, certificates and etcd's data go, and sets what is unset here.
# shellcheck shell=bash disable=SC2154  # the scripts that source this set the variables

services=10.96.0.0/16
patience=120 # seconds for one part; a busy machine needs more than the usual two
api_options=()
manager_options=()
declare -A started

# Certificates in pki/, a kubeconfig for each part in etc/, the admin's in kubeconfig. Needs etc/kubeadm.yaml.
make_certificates() {
  sed -i "s|@STATE@|$state|; s|@KUBERNETES@|$(pinned kubernetes k8s.io/kubernetes)|; s|@ADDRESS@|$address|
    s|@API_PORT@|$api_port|; s|@ETCD_PORT@|$etcd_port|; s|@SERVICES@|$services|" etc/kubeadm.yaml
  {
    kubeadm init phase certs all --config etc/kubeadm.yaml
    kubeadm init phase kubeconfig all --config etc/kubeadm.yaml --kubeconfig-dir etc
  } >log/kubeadm.log 2>&1 || fail kubeadm "cannot create certificates"
  mv etc/super-admin.conf kubeconfig
}

start_control_plane() {
  run etcd etcd --data-dir etcd --unsafe-no-fsync --log-level warn \
    --listen-client-urls "http://127.0.0.1:$etcd_port" --advertise-client-urls "http://127.0.0.1:$etcd_port" \
    --listen-peer-urls "http://127.0.0.1:$peer_port"
  run kube-apiserver kube-apiserver \
    --etcd-servers "http://127.0.0.1:$etcd_port" \
    --secure-port "$api_port" --advertise-address "$address" \
    --tls-cert-file pki/apiserver.crt --tls-private-key-file pki/apiserver.key \
    --authorization-mode Node,RBAC --client-ca-file pki/ca.crt \
    --service-cluster-ip-range $services --allow-privileged \
    --service-account-issuer https://kubernetes.default.svc \
    --service-account-key-file pki/sa.pub --service-account-signing-key-file pki/sa.key \
    --kubelet-preferred-address-types InternalIP \
    --kubelet-client-certificate pki/apiserver-kubelet-client.crt \
    --kubelet-client-key pki/apiserver-kubelet-client.key \
    --enable-aggregator-routing \
    --proxy-client-cert-file pki/front-proxy-client.crt --proxy-client-key-file pki/front-proxy-client.key \
    --requestheader-client-ca-file pki/front-proxy-ca.crt --requestheader-allowed-names front-proxy-client \
    --requestheader-username-headers X-Remote-User --requestheader-group-headers X-Remote-Group \
    --requestheader-extra-headers-prefix X-Remote-Extra- "${api_options[@]}"
  wait_for kube-apiserver kubectl get --raw /readyz
  run kube-controller-manager kube-controller-manager --kubeconfig etc/controller-manager.conf --leader-elect=false \
    --bind-address 127.0.0.1 --secure-port "$manager_port" --use-service-account-credentials \
    --service-account-private-key-file pki/sa.key --root-ca-file pki/ca.crt \
    --cluster-signing-cert-file pki/ca.crt --cluster-signing-key-file pki/ca.key "${manager_options[@]}"
  run kube-scheduler kube-scheduler --kubeconfig etc/scheduler.conf --leader-elect=false --bind-address 127.0.0.1 \
    --secure-port "$scheduler_port"
}

# run NAME COMMAND…: a process that outlives this script and takes nothing of its environment, terminal or lock.
run() {
  local name=$1
  shift
  setsid env -i PATH="$PATH" HOME="$state" "$@" >"log/$name.log" 2>&1 </dev/null 9<&- &
  started[$name]=$!
}

# wait_for DAEMON COMMAND…: until the command succeeds; gives up when the daemon ends.
wait_for() {
  local daemon=$1 deadline=$((SECONDS + patience))
  shift
  until "$@" >/dev/null 2>&1; do
    [[ ! ${started[$daemon]:-} ]] || kill -0 "${started[$daemon]}" 2>/dev/null || fail "$daemon" "$daemon has ended"
    ((SECONDS < deadline)) || fail "$daemon" "$daemon is not ready after $patience s"
    sleep 0.1
  done
}

fail() {
  tail -n 12 "$state/log/$1.log" >&2
  die "$2 (all of its log: $state/log/$1.log)"
}
