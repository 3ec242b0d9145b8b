#!/usr/bin/env bash
# Puts a kernel into the cache and prints its directory: `vmlinuz`, `overlay.ko` for guests, and `modules`, a root
# directory with the modules for file systems and disks. Debian's package is unpacked, not installed, so that the host's
# boot loader is not changed. Virtiofs and FUSE are built into this kernel.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Uses a kernel in the cache; remove its directory to get the newest.
cached_kernel() {
    find "$cache" -maxdepth 1 -name 'kernel-6.12.*' | sort -V | tail -n 1
}

newest_available() {
    apt-cache search --names-only '^linux-image-6\.12\.[0-9]+\+deb12-amd64-unsigned$' |
        cut -d' ' -f1 | sort -V | tail -n 1
}

# Old package lists name packages that no longer exist.
lists_are_fresh() {
    [[ -n $(newest_available) && -n $(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -ctime -1 -print -quit) ]]
}

available_after_update() {
    local package
    lists_are_fresh || (as_root apt-get update >/dev/null) || say "package lists may be out of date"
    package=$(newest_available)
    [[ -n $package ]] || fail "apt: no package linux-image-6.12.*+deb12-amd64-unsigned; add bookworm-security to its sources"
    echo "$package"
}

unpack_kernel() {
    local package=$1 out=$2 unpacked=$2.unpacked
    mkdir -p "$unpacked" "$out"
    (cd "$unpacked" && apt-get download "$package" && dpkg-deb -x ./*.deb .)
    cp "$unpacked"/boot/vmlinuz-* "$out/vmlinuz"
    xz -dc "$unpacked"/lib/modules/*/kernel/fs/overlayfs/overlay.ko.xz >"$out/overlay.ko"
    copy_modules "$unpacked" "$out/modules"
    rm -rf "$unpacked"
}

# Copies the modules for disks, I/O limits and file systems. Test hosts have no other hardware.
copy_modules() {
    local from=$1 to=$2 version part
    version=$(basename "$from"/lib/modules/*)
    for part in fs block lib crypto drivers/block; do
        mkdir -p "$to/lib/modules/$version/kernel/$part"
        cp -r "$from/lib/modules/$version/kernel/$part/." "$to/lib/modules/$version/kernel/$part"
    done
    cp "$from/lib/modules/$version"/modules.{order,builtin,builtin.modinfo} "$to/lib/modules/$version"
    # /lib is a link to /usr/lib in Debian's root, over which these modules are mounted.
    mkdir "$to/usr" && mv "$to/lib" "$to/usr/lib"
    depmod --basedir "$to/usr" "$version"
}

main() {
    local kernel package
    kernel=$(cached_kernel)
    if [[ -z $kernel ]]; then
        package=$(available_after_update)
        kernel=$cache/kernel-${package#linux-image-}
        artefact "${kernel##*/}" unpack_kernel "$package"
    fi
    echo "$kernel"
}

main
