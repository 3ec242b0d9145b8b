#!/usr/bin/env bash
# cargo-tool.sh NAME VERSION: builds a published program at exactly that version into the cache and
# prints the path of its binary.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_tool() {
    local tool=$1 version=$2 out=$3
    command -v cargo >/dev/null || fail "needs Rust 1.95 or newer with cargo on the PATH"
    # Its own target directory: the workspace's belongs to the workspace, and is locked while it builds.
    CARGO_TARGET_DIR=$out.target cargo install "$tool" --version "=$version" --locked --root "$out"
    rm -rf "$out.target"
}

tool=${1:?cargo-tool.sh NAME VERSION} version=${2:?cargo-tool.sh NAME VERSION}
artefact "$tool-$version" install_tool "$tool" "$version"
echo "$cache/$tool-$version/bin/$tool"
