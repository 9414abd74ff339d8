# What the scripts of this directory share: places, the lock, images that are kept in the cache.
# shellcheck shell=bash disable=SC2034  # the scripts that source this read the variables

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
# shellcheck source=../lib.sh
source "$here/../lib.sh"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/beamline
state=${BEAMLINE_CLUSTER_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/beamline/cluster}

# True for CLUSTER=current: use the cluster of the current kubectl context, and create nothing.
uses_current_context() {
  case ${CLUSTER:-} in
    current) return 0 ;;
    "") return 1 ;;
    *) die "CLUSTER=$CLUSTER is not known: leave it unset for the local cluster, or set CLUSTER=current" ;;
  esac
}

require_root() {
  ((EUID == 0)) || die "the cluster needs root (containers, mounts, network): sudo -E env PATH=\"\$PATH\" $0"
}

# One up or down at a time on this machine. The lock ends with the script; nothing is left on disk.
lock_machine() {
  exec 9</run
  flock -n 9 && return
  say "waiting for another up or down to finish"
  flock 9
}

# The version of MODULE that tools/TOOL/go.mod pins, as it is written there (v1.2.3).
pinned() {
  awk -v module="$2" '{ sub(/^require /, "") } $1 == module { print $2; exit }' "$here/tools/$1/go.mod"
}

# image_archive REFERENCE CONTEXT_DIR PREPARE: prints the path of an OCI archive in the cache. When there is none for
# this context yet, it is built from a copy, into which `PREPARE DIR` first puts the programs.
image_archive() {
  local reference=$1 context=$2 prepare=$3 key archive
  key=$({ cat "$context"/*; declare -f "$prepare"; } | sha256sum)
  archive=${reference##*/}
  archive=$cache/images/${archive/:/-}-${key::8}.tar
  [[ -e $archive ]] || (
    mkdir -p "$cache/images"
    temp=$(mktemp -d "$cache/images/.context.XXXXXX")
    trap 'rm -rf "$temp"' EXIT
    cp -r "$context/." "$temp"
    "$prepare" "$temp"
    build_archive "$reference" "$temp" "$archive"
  )
  echo "$archive"
}
