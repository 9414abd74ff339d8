#!/usr/bin/env bash
# Ends the local cluster and leaves nothing of it on the machine; what was built stays in the cache. usage: down.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$here/remains.sh"

if uses_current_context; then
  say "CLUSTER=current: that cluster was not started here, so it stays up"
  exit
fi
if [[ ! -e $state && $(bridge_owner) != "$state" && -z $(processes "$state") ]]; then
  say "no cluster is up"
  exit
fi
require_root
lock_machine
clear_cluster "$state"
rmdir --ignore-fail-on-non-empty "$(dirname "$state")" 2>/dev/null || true
say "the cluster is down"
