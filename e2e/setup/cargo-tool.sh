#!/usr/bin/env bash
# cargo-tool.sh NAME VERSION: builds exactly this version of a published program into the cache, and prints the path of
# its binary.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_tool() {
    local tool=$1 version=$2 out=$3
    command -v cargo >/dev/null || fail "needs Rust 1.95 or newer with cargo on the PATH"
    # A target directory of its own: cargo locks the workspace's while it builds.
    CARGO_TARGET_DIR=$out.target cargo install "$tool" --version "=$version" --locked --root "$out"
    rm -rf "$out.target"
}

tool=${1:?cargo-tool.sh NAME VERSION} version=${2:?cargo-tool.sh NAME VERSION}
artefact "$tool-$version" install_tool "$tool" "$version"
echo "$cache/$tool-$version/bin/$tool"
