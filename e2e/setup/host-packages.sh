#!/usr/bin/env bash
# host-packages.sh [REVISION]: makes a .deb and an .rpm of the programs in target/release in target/packages. Their metadata and
# lists of files are in daemonset/agent/Cargo.toml. REVISION counts packages of one version; 1 by default.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

programs=(virtiofs-agent virtiofs-broker virtiofs-keeper virtiofs-engine virtiofsd-live virtiofsctl)
revision=${1:-1}
out=$tree/target/packages
files=$out/files

# What is not in the tree as it is packaged.
generate() {
    local program ctl=$tree/target/release/virtiofsctl
    rm -rf "$files"
    mkdir -p "$files"/{bin,man,completions}
    for program in "${programs[@]}"; do
        # What explains a fault is in the build's own files; in a package it is most of the size.
        strip -o "$files/bin/$program" "$tree/target/release/$program" || fail "no $program in target/release: make build"
    done
    "$ctl" man "$files/man"
    gzip -9n "$files"/man/*
    "$ctl" completions bash >"$files/completions/virtiofsctl"
    "$ctl" completions zsh >"$files/completions/_virtiofsctl"
    "$ctl" completions fish >"$files/completions/virtiofsctl.fish"
}

main() {
    local deb rpm
    deb=$("$setup_dir/cargo-tool.sh" cargo-deb 3.8.0)
    rpm=$("$setup_dir/cargo-tool.sh" cargo-generate-rpm 0.21.1)
    rm -f "$out"/*-"$revision"[._]*
    generate
    cd "$tree"
    "$deb" deb --quiet --no-build --no-strip --fast --package virtiofs-agent --deb-revision "$revision" --output "$out/"
    "$rpm" generate-rpm --package daemonset/agent --payload-compress gzip \
        --set-metadata "release = \"$revision\"" --output "$out/"
    ls "$out"/*-"$revision"[._]*
}

main
