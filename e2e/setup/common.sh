# Sourced by every set-up script: where built parts are kept, and how they get there.
# shellcheck shell=bash disable=SC2034 # names set here are for those who source it
set -euo pipefail

setup_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tree=$(cd "$setup_dir/../.." && pwd)
# Outside the tree: a fresh clone finds what an earlier one built.
cache=${VIRTIOFS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/virtiofs-operator}
mkdir -p "$cache"

say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "needs root to install packages: run it as root, or install sudo"
    fi
}

building=
clean_up() {
    local status=$?
    [[ -n $building ]] || return 0
    if ((status != 0)); then
        printf -- '---- the end of the log that explains it:\n' >&2
        tail -n 40 "$building/log" >&2 || true
    fi
    rm -rf "$building"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# artefact NAME COMMAND...: runs COMMAND with one more argument, a directory that does not exist yet,
# and keeps what it leaves there as $cache/NAME. Does nothing when that exists. It appears whole or
# not at all, and two set-ups at once build it once.
artefact() {
    local name=$1 final=$cache/$1 lock
    shift
    [[ ! -d $final ]] || return 0
    exec {lock}>"$cache/.$name.lock"
    flock "$lock"
    if [[ ! -d $final ]]; then
        say "$name: building (kept in $cache)"
        local from=$SECONDS
        building=$(mktemp -d "$cache/.building-$name.XXXXXX")
        "$@" "$building/out" >"$building/log" 2>&1 {lock}>&-
        mv -T "$building/out" "$final"
        rm -rf "$building"
        building=
        say "$name: done in $((SECONDS - from)) s"
    fi
    exec {lock}>&-
}
