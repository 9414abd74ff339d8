# What the scripts of this directory share: places, messages, prerequisites.
# shellcheck shell=bash disable=SC2034  # the scripts that source this read the variables

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/beamline
state=${BEAMLINE_CLUSTER_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/beamline/cluster}

say() { printf '%s\n' "$*" >&2; }

# The status says that the user has been told, here or in a script that was called.
die() {
  say "error: $*"
  exit 3
}

# What nobody foresaw must not end a script without a word, nor go unnoticed in $(…).
set -E
shopt -s inherit_errexit
trap '(($? == 3)) || say "error: ${BASH_SOURCE[0]} line $LINENO: $BASH_COMMAND"' ERR

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

# require COMMAND=PACKAGE …: installs missing Debian packages; where it cannot, says what is missing.
require() {
  local pair missing=()
  for pair; do
    type -P "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
  done
  ((${#missing[@]})) || return 0
  type -P apt-get >/dev/null || die "missing: ${missing[*]} (install them with your package manager)"
  ((EUID == 0)) || die "missing: ${missing[*]} (sudo apt-get install -y ${missing[*]})"
  say "installing Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null ||
    die "apt-get could not install ${missing[*]}"
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
  [[ -e $archive ]] || build_archive "$reference" "$context" "$prepare" "$archive"
  echo "$archive"
}

build_archive() (
  require buildah=buildah
  mkdir -p "$cache/images"
  temp=$(mktemp -d "$cache/images/.build.XXXXXX")
  trap 'rm -rf "$temp"' EXIT
  cp -r "$2" "$temp/context"
  "$3" "$temp/context"
  # A store of its own, so that nothing stays behind; a fixed time, so that the same content has the same digest.
  buildah --root "$temp/store" --runroot "$temp/run" --storage-driver vfs build --isolation chroot --quiet \
    --timestamp 0 -t "oci-archive:$temp/image.tar:$1" "$temp/context" >/dev/null
  mv "$temp/image.tar" "$4"
)
