#!/usr/bin/env bash
# Random input, made from the corpus, for all that judges what comes from outside.
# usage: [SEED=N] run.sh SECONDS [TARGET…]   (all targets by default; SEED 0, the default, is one by chance)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

cd "$(dirname "${BASH_SOURCE[0]}")"
results=$(realpath -m ../../target/fuzz)
all=(assignment path sql sqlite url)

main() {
  local seconds=$1 target
  shift
  (($#)) || set -- "${all[@]}"
  require_rust
  require c++=g++
  # The same versions as in the programs.
  [[ Cargo.lock -nt ../../Cargo.lock ]] || cp ../../Cargo.lock Cargo.lock
  cargo build --quiet --bins
  programs=$(echo "$results"/*-*/debug)
  TMPDIR=$(mktemp -d)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
  for target; do
    seed "$target"
    run "$target" "$seconds"
  done
}

run() {
  local target=$1 log=$results/$1.log input
  mkdir -p "$results/found/$target"
  say "fuzz $target: $2 s"
  "$programs/$target" -seed="${SEED:-0}" -max_total_time="$2" -timeout=10 -artifact_prefix="$results/$target-" \
    -print_final_stats=1 "$results/found/$target" "$results/seeds/$target" >"$log" 2>&1 || {
    grep -aE -A 2 'panicked at|^SUMMARY' "$log" | cut -c -300 >&2 || tail -n 20 "$log" >&2
    input=$(grep -ao "$results/$target-[a-z]*-[0-9a-f]*" "$log" | tail -n 1)
    die "fuzz $target has found something (all of it: $log); again: $programs/$target $input"
  }
  say "fuzz $target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs"
}

# The lines of the corpus without what they expect, a file each. What earlier runs found lies apart.
seed() {
  local files line index=0 seeds=$results/seeds/$1
  case $1 in
    assignment) files=(documents fields) ;;
    path) files=(paths) ;;
    sql) files=(postgres mysql) ;;
    sqlite) files=(sql) ;;
    url) files=(urls) ;;
    *) die "there is no target $1: choose from ${all[*]}" ;;
  esac
  rm -rf "$seeds"
  mkdir -p "$seeds"
  while IFS= read -r line; do
    index=$((index + 1))
    printf %b "$line" >"$seeds/$index"
  done < <(cd ../corpus && sed -E '/^(#|$)/d; s/^[0-9]+ ((\/[^ ]*|-) )?//' "${files[@]/%/.txt}")
}

main "$@"
