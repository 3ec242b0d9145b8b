#!/usr/bin/env bash
# packages.sh GROUP...: installs the Debian packages of these groups that are missing.
#   build     what the workspace needs to compile and link
#   check     what looks at the sources and the systemd units, beside Rust's own tools
#   guest     what boots a guest
#   host      what makes a Debian host with systemd that boots as a VM
#   packages  what makes packages of the programs
#   node      what a Kubernetes node is made of, beside what kubernetes-tools.sh builds
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

packages_of() {
    case $1 in
    build) echo gcc libc6-dev make pkg-config libseccomp-dev libcap-ng-dev ;;
    check) echo shellcheck systemd openssl e2fsprogs xfsprogs btrfs-progs ;;
    guest) echo qemu-system-x86 busybox-static xz-utils kmod ;;
    host) echo mmdebstrap util-linux ;;
    packages) echo binutils dpkg-dev rpm ;;
    node) echo openssl containerd runc podman catatonit containernetworking-plugins iptables kmod iproute2 util-linux ;;
    *) fail "no package group '$1'; there are build, check, guest, host, packages and node" ;;
    esac
}

missing() {
    local package
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package"
    done
}

# Nothing that is installed is removed for it: Debian's containerd and runc would take Docker's place. A new machine's
# own updates hold the lock for a while.
install_packages() {
    say "installing $*"
    local log
    log=$(mktemp)
    if ! { as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -o DPkg::Lock::Timeout=300 install -y --no-remove --no-install-recommends "$@"; } >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        fail "apt-get could not install $*"
    fi
    rm -f "$log"
}

main() {
    local group wanted=() absent
    for group in "$@"; do
        read -ra names <<<"$(packages_of "$group")"
        wanted+=("${names[@]}")
    done
    if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
        fail "knows only Debian and its kin; on this system install the equivalents of: ${wanted[*]}"
    fi
    mapfile -t absent < <(missing "${wanted[@]}")
    ((${#absent[@]} == 0)) || install_packages "${absent[@]}"
}

main "$@"
