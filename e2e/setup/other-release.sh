#!/usr/bin/env bash
# other-release.sh COMMIT: builds keeper, broker, engine, agent and virtiofsctl of another commit of this repository into
# the cache, and prints the directory of the binaries.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

build_commit() {
    local commit=$1 out=$2 work=$2.tree
    mkdir "$work"
    git -C "$tree" archive "$commit" | tar -x -C "$work"
    (cd "$work" && CARGO_TARGET_DIR=$out.target cargo build --locked \
        -p virtiofs-keeper -p virtiofs-broker -p virtiofs-engine -p virtiofs-agent -p virtiofsctl)
    mkdir "$out"
    cp "$out".target/debug/{virtiofs-keeper,virtiofs-broker,virtiofs-engine,virtiofs-agent,virtiofsctl} "$out"
}

named=${1:-}
[[ -n $named ]] || fail "FROM: a commit is expected, for example make upgrade FROM=HEAD~10"
commit=$(git -C "$tree" rev-parse --verify --quiet "$named^{commit}") ||
    fail "FROM=$named: no such commit; in a shallow clone, fetch it first"
artefact "release-$commit" build_commit "$commit"
echo "$cache/release-$commit"
