# What all scripts below tests/ share: messages, prerequisites, images without a Docker daemon.
# shellcheck shell=bash

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
  install_packages "${missing[@]}" || die "apt-get could not install ${missing[*]}"
}

# Waits for whoever else installs something: it may be another script, or what one left behind that was interrupted.
install_packages() {
  local errors
  export DEBIAN_FRONTEND=noninteractive
  until errors=$({ apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } 2>&1 >/dev/null); do
    [[ $errors == *"get lock"* ]] || { say "$errors"; return 1; }
    sleep 1
  done
}

# The servers that sql.query is tested with. Debian keeps PostgreSQL's programs out of PATH; MariaDB needs no service.
require_databases() {
  compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || require postgres=postgresql
  # What sets a data directory up asks a program that Debian has in the client's package.
  require mariadbd=mariadb-server-core my_print_defaults=mariadb-client-core
}

require_rust() {
  type -P cargo >/dev/null || die "cargo is missing: install Rust 1.94 or newer (https://rustup.rs) and put it in PATH"
}

# build_archive REFERENCE CONTEXT_DIR ARCHIVE: the image of a context as an OCI archive. A store of its own, so that
# nothing stays behind; a fixed time, so that the same content has the same digest.
build_archive() (
  require buildah=buildah
  temp=$(mktemp -d "$(dirname "$3")/.build.XXXXXX")
  trap 'rm -rf "$temp"' EXIT
  buildah --root "$temp/store" --runroot "$temp/run" --storage-driver vfs build --isolation chroot --quiet \
    --timestamp 0 -t "oci-archive:$temp/image.tar:$1" "$2" >/dev/null
  mv "$temp/image.tar" "$3"
)

# A line that is rewritten every second on a terminal, and a line every 15 s elsewhere. `shown` is when it was last.
progress() {
  if [[ -t 2 ]]; then
    ((SECONDS > shown)) || return 0
    printf '\r\033[K%s … %s elapsed' "$1" "$(elapsed)" >&2
  else
    ((SECONDS - shown >= 15)) || return 0
    say "$1 … $(elapsed) elapsed"
  fi
  shown=$SECONDS
}

clear_line() { [[ ! -t 2 ]] || printf '\r\033[K' >&2; }

# Since the moment in `since`.
elapsed() {
  local seconds=$((SECONDS - since))
  ((seconds < 60)) && echo "${seconds}s" || printf '%dm%02ds\n' $((seconds / 60)) $((seconds % 60))
}

# cargo_build LABEL OPTION…: builds with a line that says how far it is, instead of one for each crate.
cargo_build() (
  label=$1
  shift
  crates=$(cargo tree --quiet --workspace --edges normal,build --prefix none | sort -u | wc -l)
  log=$(mktemp)
  since=$SECONDS shown=$SECONDS
  cargo build --color never "$@" >"$log" 2>&1 &
  while kill -0 $! 2>/dev/null; do
    progress "$label: $(grep -c '^ *Compiling' "$log" || true) of at most $crates crates"
    sleep 0.5
  done
  clear_line
  wait $! || { tail -n 30 "$log" >&2; rm -f "$log"; die "failed: cargo build $*"; }
  rm -f "$log"
)
