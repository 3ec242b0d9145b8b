#!/usr/bin/env bash
# Puts a kernel and its modules into the cache and prints their directory: `vmlinuz`, `overlay.ko` for guests, and
# `modules`, a root with those of file systems and disks in it. Debian's package is unpacked, not installed: the host's
# own boot loader is none of our business. Virtiofs and FUSE are built into this kernel.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# A kernel already here is good enough; remove its directory to get the newest.
cached_kernel() {
    find "$cache" -maxdepth 1 -name 'kernel-6.12.*' | sort -V | tail -n 1
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
    keep_modules "$unpacked" "$out/modules"
    rm -rf "$unpacked"
}

# A host of tests mounts disks and limits them; it has no other hardware.
keep_modules() {
    local from=$1 to=$2 version part
    version=$(basename "$from"/lib/modules/*)
    for part in fs block lib crypto drivers/block; do
        mkdir -p "$to/lib/modules/$version/kernel/$part"
        cp -r "$from/lib/modules/$version/kernel/$part/." "$to/lib/modules/$version/kernel/$part"
    done
    cp "$from/lib/modules/$version"/modules.{order,builtin,builtin.modinfo} "$to/lib/modules/$version"
    # Debian's /lib is a link: so it is in a root that these are laid over.
    mkdir "$to/usr" && mv "$to/lib" "$to/usr/lib"
    depmod --basedir "$to/usr" "$version"
}

main() {
    local kernel package
    kernel=$(cached_kernel)
    if [[ -z $kernel ]]; then
        package=$(offered_after_update)
        kernel=$cache/kernel-${package#linux-image-}
        artefact "${kernel##*/}" unpack_kernel "$package"
    fi
    echo "$kernel"
}

main
