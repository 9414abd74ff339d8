#!/usr/bin/env bash
# Runs the steps of `make test` that are named, in their order, and says how long each took.
# usage: run.sh STEP …, of check unit fuzz worker faults operator cluster demo keda cert-manager bench bench-tenants
#   bench-operator bench-scale bench-scale-sim campaign-kill campaign-crash campaign-rollout campaign-scale-in campaign-flips
#   campaign-budgets campaign-operator
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Every cargo command selects the whole workspace: another selection would unify features anew and build twice.
check() {
  require shellcheck=shellcheck
  cargo fmt --all --check
  cargo fmt --check --manifest-path tests/fuzz/Cargo.toml
  cargo clippy --quiet --workspace --all-targets -- -D warnings
  git ls-files '*.sh' .ci/run | xargs shellcheck -x
}

unit() {
  cargo test --workspace --lib --bins
  # These need a process of their own.
  cargo test --workspace --lib -- --ignored
}

# In a target directory of its own: everything is built with counters. With the same seed each time, so that a change is
# not refused for what it did not bring; `make fuzz` takes one by chance.
fuzz() { SEED=${SEED:-1} tests/fuzz/run.sh "${TIME:-5}"; }

worker() {
  local tools suite suites=()
  tools=$(tests/cluster/tools.sh --path nats-server)
  require_databases
  require strace=strace
  for suite in tests/suites/*.rs; do
    [[ $suite == */cluster*.rs || $suite == */operator_plane.rs ]] || suites+=("$(basename "$suite" .rs)")
  done
  cargo build --workspace --bins
  cargo test --workspace --no-run "${suites[@]/#/--test=}"
  # Most of the time they wait, for a hold to lapse: two side by side, and in each more than there are cores.
  export -f suite
  printf '%s\n' "${suites[@]}" | PATH=$tools:$PATH RUST_TEST_THREADS=4 xargs -P 2 -I {} bash -c 'suite {}'
}

# suite NAME: what it says is shown when it has ended.
suite() {
  local said ended=0
  said=$(cargo test --workspace --test "$1" 2>&1) || ended=$?
  printf '%s\n' "$said"
  return "$ended"
}

cluster() {
  local tools
  tests/image.sh beamline fast
  tests/image.sh peer fast
  if [[ ${CLUSTER:-} ]]; then
    tools=$(tests/cluster/tools.sh --path helm helm3)
  else
    tools=$(tests/cluster/tools.sh --path)
    # One cluster at a time fits a machine, and the first thing to test is how it comes and goes.
    tests/cluster/down.sh
    tests/cluster/selftest.sh
  fi
  tests/cluster/up.sh
  tests/cluster/load-image.sh target/image/*.tar
  PATH=$tools:$PATH KUBECONFIG=$(tests/cluster/kubeconfig.sh) cargo test --workspace --test cluster --test cluster_chart
}

demo() { tests/demo/demo.sh; }

# Short enough for every `make test`; a seed by chance each time, which the output names. A machine that does other work
# too may hold a few orphans up, but not half of them: `make campaign-kill` and `campaign-crash` hold all to the promise.
faults() {
  cargo build --workspace --bins
  campaign debug kill --assignments 20000 --rate 400 --least worker-kill=20 --least broker-kill=2 --recovery 30
  campaign debug crash --faults kill --recovery 30
}

campaign-kill() {
  local assignments=${N:-2000000}
  cargo build --release --workspace --bins
  campaign release kill --assignments "$assignments" --workers 8 --broker-every 30 --disturb-every 5 \
    --least worker-kill=$((assignments / 10000)) --least broker-kill=$((assignments / 200000))
}

# A build with debug assertions: only such ones have fail-points.
campaign-crash() {
  cargo build --workspace --bins
  campaign debug crash
}

campaign-rollout() {
  cargo build --workspace --bins
  campaign debug rollout --generations "${N:-20}"
}

campaign-scale-in() {
  cargo build --workspace --bins
  campaign debug scale-in --scale-ins "${N:-200}"
}

campaign-budgets() {
  SEEDS=${SEEDS:-100000} cargo test --quiet --workspace --test budget_simulation -- --nocapture no_window
}

# campaign PROFILE ARGUMENT…: its last line is the answer, as JSON.
campaign() {
  local tools
  tools=$(tests/cluster/tools.sh --path nats-server kubernetes etcd kwok helm)
  PATH=$tools:$PATH "target/$1/campaign" "${@:2}" ${SEED:+--seed "$SEED"} \
    --commit "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
}

# The operator on control planes of its own, beside whatever cluster there is.
operator() {
  cargo build --workspace --bins
  operator_plane
  campaign debug scale-in --scale-ins 12
}

campaign-operator() {
  cargo build --workspace --bins
  BEAMLINE_CAMPAIGN=yes operator_plane --nocapture --test-threads 1
}

# In mode HPA, where it is followed, and in mode Operator, where it has no effect.
campaign-flips() {
  cargo build --workspace --bins
  FLIPS=${N:-300} operator_plane --nocapture that_flips
}

operator_plane() {
  local tools
  tools=$(tests/cluster/tools.sh --path nats-server kubernetes etcd kwok helm)
  # Most of the time they wait, as those of the worker do.
  PATH=$tools:$PATH RUST_TEST_THREADS=8 cargo test --workspace --test operator_plane -- "$@"
}

# Not a part of `make test`: KEDA takes minutes to build.
keda() {
  local tools
  cargo build --workspace --bins
  tools=$(tests/cluster/tools.sh --path nats-server kubernetes etcd kwok helm keda)
  PATH=$tools:$PATH cargo test --workspace --test operator_plane -- --ignored --nocapture real_keda
}

# Not either: cert-manager.
cert-manager() {
  local tools
  cargo build --workspace --bins
  tools=$(tests/cluster/tools.sh --path nats-server kubernetes etcd kwok helm cert-manager)
  PATH=$tools:$PATH cargo test --workspace --test operator_plane -- --ignored --nocapture real_cert_manager
}

bench-operator() {
  local tools
  tools=$(tests/cluster/tools.sh --path nats-server kubernetes etcd kwok helm)
  cargo build --release --workspace --bins
  PATH=$tools:$PATH target/release/bench operator --pools "${N:-200}"
}

bench() {
  local tools
  require_databases
  tools=$(tests/cluster/tools.sh --path nats-server)
  cargo build --release --workspace --bins
  PATH=$tools:$PATH target/release/bench
}

bench-tenants() {
  local tools
  tools=$(tests/cluster/tools.sh --path nats-server)
  cargo build --release --workspace --bins
  PATH=$tools:$PATH target/release/bench tenants ${SEED:+--seed "$SEED"}
}

# On a cluster of its own kind: autoscalers look at it as often as by default.
bench-scale() {
  local tools
  tests/image.sh beamline "${PROFILE:-fast}"
  tests/image.sh peer "${PROFILE:-fast}"
  cargo build --workspace --bins
  tools=$(tests/cluster/tools.sh --path)
  tests/cluster/down.sh
  trap tests/cluster/down.sh EXIT
  AUTOSCALER_SYNC=15s tests/cluster/up.sh
  tests/cluster/load-image.sh target/image/*.tar
  # KEDA takes minutes to build, once.
  [[ ! ${KEDA:-} ]] || tools=$tools:$(tests/cluster/tools.sh --path keda)
  PATH=$tools:$PATH KUBECONFIG=$(tests/cluster/kubeconfig.sh) target/debug/bench scale --spikes "${N:-50}" \
    --driven "${KEDA:-0}"
}

bench-scale-sim() {
  HOURS=${HOURS:-1000} cargo test --quiet --workspace --test scale_simulation -- --nocapture
}

require_rust
require cc=gcc
for step; do
  case $step in
    check | unit | fuzz | worker | faults | operator | cluster | demo | keda | cert-manager | bench) ;;
    bench-tenants | bench-operator | bench-scale | bench-scale-sim) ;;
    campaign-kill | campaign-crash | campaign-rollout | campaign-scale-in | campaign-flips) ;;
    campaign-budgets | campaign-operator) ;;
    *) die "there is no step $step: choose from check, unit, fuzz, worker, faults, operator, cluster, demo, keda," \
      "cert-manager, bench, bench-tenants, bench-operator, bench-scale, bench-scale-sim, campaign-kill, campaign-crash, campaign-rollout," \
      "campaign-scale-in, campaign-flips, campaign-budgets, campaign-operator" ;;
  esac
  say "== $step"
  started=$SECONDS
  "$step"
  say "== $step done in $((SECONDS - started)) s"
done
