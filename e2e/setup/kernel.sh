#!/usr/bin/env bash
# Puts a guest kernel and its overlay module into the cache and prints their directory. Debian's
# package is unpacked, not installed: the host's own boot loader is none of our business. Virtiofs and
# FUSE are built into this kernel, overlayfs is a module.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# A kernel already here is good enough; remove its directory to get the newest.
cached_kernel() {
    find "$cache" -maxdepth 1 -name 'guest-kernel-6.12.*' | sort -V | tail -n 1
}

newest_offered() {
    apt-cache search --names-only '^linux-image-6\.12\.[0-9]+\+deb12-amd64-unsigned$' |
        cut -d' ' -f1 | sort -V | tail -n 1
}

# Lists of some weeks ago name packages that are offered no more.
lists_are_fresh() {
    [[ -n $(newest_offered) && -n $(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -ctime -1 -print -quit) ]]
}

offered_after_update() {
    local package
    lists_are_fresh || (as_root apt-get update >/dev/null) || say "the lists of packages may be out of date"
    package=$(newest_offered)
    [[ -n $package ]] || fail "apt offers no linux-image-6.12.*+deb12-amd64-unsigned: is bookworm-security among its sources?"
    echo "$package"
}

unpack_kernel() {
    local package=$1 out=$2 unpacked=$2.unpacked
    mkdir -p "$unpacked" "$out"
    (cd "$unpacked" && apt-get download "$package" && dpkg-deb -x ./*.deb .)
    cp "$unpacked"/boot/vmlinuz-* "$out/vmlinuz"
    xz -dc "$unpacked"/lib/modules/*/kernel/fs/overlayfs/overlay.ko.xz >"$out/overlay.ko"
    rm -rf "$unpacked"
}

main() {
    local kernel package
    kernel=$(cached_kernel)
    if [[ -z $kernel ]]; then
        package=$(offered_after_update)
        kernel=$cache/guest-kernel-${package#linux-image-}
        artefact "${kernel##*/}" unpack_kernel "$package"
    fi
    echo "$kernel"
}

main
