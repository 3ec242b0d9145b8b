# Sourced by every set-up script: the cache of built parts, messages, privileges.
# shellcheck shell=bash disable=SC2034 # the scripts that source it use these names
set -euo pipefail

setup_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tree=$(cd "$setup_dir/../.." && pwd)
# The cache is outside of the tree, so that a fresh clone reuses it.
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
        printf -- '---- end of the log:\n' >&2
        tail -n 40 "$building/log" >&2 || true
    fi
    rm -rf "$building"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# artefact NAME COMMAND...: builds $cache/NAME unless it exists. Runs COMMAND with one more argument, the path of a
# directory that COMMAND creates, and renames that directory to $cache/NAME: it appears complete or not at all.
# Concurrent set-ups build it once.
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
