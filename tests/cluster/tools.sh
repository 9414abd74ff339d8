#!/usr/bin/env bash
# Builds the programs that the cluster and the tests run, from the modules pinned in tools/, into the user's cache.
# usage: tools.sh [--path] [TOOL…]   (all but KEDA and cert-manager by default; --path also prints their directories for PATH)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

all=(nats-server etcd kubernetes coredns kwok helm helm3 kubeconform promtool)
# These are built where somebody asks for them by name.
others=(keda cert-manager)

main() {
  local print_path='' path='' tool dir
  [[ ${1:-} != --path ]] || { print_path=yes; shift; }
  (($#)) || set -- "${all[@]}"
  for tool; do
    recipe "$tool"
    dir=$(directory "$tool")
    [[ -d $dir ]] || build "$tool" "$dir"
    path+=:$dir
  done
  [[ ! $print_path ]] || echo "${path#:}"
}

# Sets how to build a tool: module and version, programs as NAME=PACKAGE, tags, linker flags, what to do afterwards, and
# the time on two cores.
recipe() {
  local program
  programs=() tags='' finish=''
  case $1 in
    nats-server)
      module=github.com/nats-io/nats-server/v2 duration="15 seconds"
      programs=("nats-server=$module")
      ;;
    etcd)
      module=go.etcd.io/etcd/server/v3 duration="20 seconds"
      programs=("etcd=$module")
      ;;
    kubernetes)
      module=k8s.io/kubernetes duration="7 minutes"
      for program in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl kubeadm; do
        programs+=("$program=$module/cmd/$program")
      done
      ;;
    coredns)
      module=github.com/coredns/coredns duration="60 seconds"
      programs=("coredns=.")
      ;;
    kwok)
      module=sigs.k8s.io/kwok duration="60 seconds" finish=write_stages
      programs=("kwok=$module/cmd/kwok")
      ;;
    helm)
      module=helm.sh/helm/v4 duration="90 seconds"
      programs=("helm=$module/cmd/helm")
      ;;
    helm3)
      module=helm.sh/helm/v3 duration="60 seconds"
      programs=("helm3=$module/cmd/helm")
      ;;
    kubeconform)
      module=github.com/yannh/kubeconform duration="20 seconds" finish=write_schemas
      programs=("kubeconform=$module/cmd/kubeconform" "schemas=.")
      ;;
    promtool)
      # Without the clients of two dozen clouds that a Prometheus can ask for its targets.
      module=github.com/prometheus/prometheus duration="2 minutes" tags=remove_all_sd
      programs=("promtool=$module/cmd/promtool")
      ;;
    keda)
      module=github.com/kedacore/keda/v2 duration="12 minutes" finish=write_keda_types
      programs=("keda-operator=$module/cmd/operator" "keda-adapter=$module/cmd/adapter")
      ;;
    cert-manager)
      module=github.com/cert-manager/cert-manager duration="3 minutes" finish=write_cert_manager_types
      programs=("cert-manager=.")
      ;;
    *) die "there is no tool $1: choose from ${all[*]} ${others[*]}" ;;
  esac
  version=$(pinned "$1" "$module")
  ldflags="-s -w$(version_stamps "$1")"
}

# These programs learn their version from the linker; the others carry it in their source.
version_stamps() {
  local package major minor
  case $1 in
    kubernetes)
      IFS=. read -r major minor _ <<<"${version#v}"
      for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        printf ' -X %s=%s' $package.gitVersion "$version" $package.gitMajor "$major" $package.gitMinor "$minor" \
          $package.gitTreeState clean
      done
      ;;
    helm | helm3) printf ' -X %s=%s' "$module/internal/version.version" "$version" ;;
  esac
}

# Where a tool is built to: another version, dependency or flag is another directory.
directory() {
  local key
  key=$({ cat "$here/tools/$1"/*; echo "${programs[*]} $ldflags"; declare -f compile; extras; } | sha256sum)
  echo "$cache/tools/$1-${version#v}-${key::8}"
}

# What some tools have besides, and makes another version of them only.
extras() {
  [[ ! $tags ]] || { echo "$tags"; declare -f compile_tagged; }
  [[ ! $finish ]] || { declare -f "$finish"; pinned kubernetes k8s.io/kubernetes; }
}

build() {
  local tool=$1 dir=$2 log=$cache/tools/$1.log program count=0
  require_go
  mkdir -p "$cache/tools"
  exec 8>"$cache/tools/.$tool.lock"
  flock -n 8 || { say "waiting for another build of $tool"; flock 8; }
  [[ ! -d $dir ]] || return 0

  rm -rf "$cache/tools/.$tool".??????
  temp=$(mktemp -d "$cache/tools/.$tool.XXXXXX")
  chmod 755 "$temp"
  trap 'kill $compiler 2>/dev/null || true; rm -rf "$temp"' EXIT
  since=$SECONDS shown=-15 compiler=
  : >"$log"
  for program in "${programs[@]}"; do
    count=$((count + 1))
    "compile${tags:+_tagged}" "$tool" "$temp/${program%%=*}" "${program#*=}" >>"$log" 2>&1 &
    compiler=$!
    while kill -0 $compiler 2>/dev/null; do
      progress "building $tool ${version#v} (first time only, about $duration): ${program%%=*} $count/${#programs[@]}"
      sleep 0.2
    done
    wait $compiler || { clear_line; tail -n 15 "$log" >&2; die "cannot build ${program%%=*} (all of it: $log)"; }
  done
  [[ ! $finish ]] || "$finish" "$temp" >>"$log" 2>&1 || { tail -n 15 "$log" >&2; die "$finish failed (all of it: $log)"; }
  mv -T "$temp" "$dir"
  trap - EXIT
  rm -f "$log"
  clear_line
  say "built $tool ${version#v} in $(elapsed)"
}

# compile TOOL PROGRAM PACKAGE
compile() {
  CGO_ENABLED=0 GOWORK=off GOFLAGS='' exec go build -C "$here/tools/$1" -trimpath -buildvcs=false -ldflags "$ldflags" \
    -o "$2" "$3"
}

# The same with the recipe's tags.
compile_tagged() {
  CGO_ENABLED=0 GOWORK=off GOFLAGS='' exec go build -C "$here/tools/$1" -trimpath -buildvcs=false -ldflags "$ldflags" \
    -tags "$tags" -o "$2" "$3"
}

# Every kind of the cluster's Kubernetes, and of the Prometheus Operator and cert-manager, as JSON schemas beside kubeconform.
write_schemas() {
  local kubernetes monitoring certificates
  kubernetes=$(module_directory kubernetes k8s.io/kubernetes)
  monitoring=$(module_directory kubeconform github.com/prometheus-operator/prometheus-operator)
  certificates=$(module_directory kubeconform github.com/cert-manager/cert-manager)
  "$1/schemas" "$1/json" "$kubernetes/api/openapi-spec/swagger.json" \
    "$monitoring"/example/prometheus-operator-crd/*_{servicemonitors,podmonitors,prometheusrules}.yaml \
    "$certificates"/deploy/crds/cert-manager.io_certificates.yaml
}

# How a fake node becomes ready, and how its pods start and go: at once.
write_stages() {
  local stages
  stages=$(module_directory kwok sigs.k8s.io/kwok)/kustomize/stage
  awk 'FNR == 1 { print "---" } 1' "$stages"/node/fast/node-*.yaml "$stages"/pod/fast/pod-*.yaml >"$1/stages.yaml"
}

# The types that KEDA brings.
write_keda_types() {
  cat "$(module_directory keda github.com/kedacore/keda/v2)"/config/crd/bases/*.yaml >"$1/crds.yaml"
}

# The types that cert-manager brings.
write_cert_manager_types() {
  cat "$(module_directory cert-manager github.com/cert-manager/cert-manager)"/deploy/crds/*.yaml >"$1/crds.yaml"
}

# module_directory TOOL MODULE: where the source of the pinned version lies.
module_directory() {
  GOWORK=off GOFLAGS='' go mod download -C "$here/tools/$1" -json "$2" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'
}

require_go() {
  type -P go >/dev/null || die "go is missing: install Go 1.26 or newer and put it in PATH"
  local minor
  minor=$(go env GOVERSION)
  minor=${minor#go1.}
  # From 1.21 on, Go fetches the version that a module asks for.
  ((${minor%%[!0-9]*} >= 21)) || die "$(go env GOVERSION) is too old: install Go 1.26 or newer"
}

main "$@"
