#!/usr/bin/env bash
# host-root.sh: makes the root of a Debian host with systemd in the cache, and prints its directory. Such a host boots as
# a VM from it. It is created again when the list of its packages or this script changes.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

suite=bookworm
packages=(
    systemd-sysv udev dbus libpam-systemd  # the service manager, sessions of users
    apparmor uidmap                        # confinement, and ranges of user ids
    iproute2 procps kmod util-linux e2fsprogs
    rpm                                    # installs the other kind of package, too
    podman crun catatonit dbus-user-session  # containers of root and of users
    libvirt-daemon-system libvirt-clients qemu-system-x86  # VMs as distributions run them
    libseccomp2 libcap-ng0 libcap2-bin     # what the programs are linked with
)

make_root() {
    local out=$1
    mmdebstrap --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" "$suite" "$out" ||
        fail "mmdebstrap could not make a root of $suite"
    # As the kernel has it by itself, and most distributions; Debian sets 0.
    echo 'kernel.yama.ptrace_scope = 1' >"$out/etc/sysctl.d/yama.conf"
    # Nothing is logged in: the console is for what a test prints, and a shell waits at a port.
    ln -s /dev/null "$out/etc/systemd/system/serial-getty@ttyS0.service"
    # Quadlet came with Podman 4.4. This one makes units for the older Podman.
    mmdebstrap --variant=extract --include=podman trixie "$out.podman" || fail "mmdebstrap could not unpack podman"
    install -D "$out.podman/usr/libexec/podman/quadlet" "$out/usr/lib/systemd/system-generators/podman-system-generator"
    rm -rf "$out.podman"
    # They are started by the tests that need them, which keeps a boot short.
    systemctl --root "$out" --quiet disable libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket \
        libvirt-guests.service virtlogd.socket virtlockd.socket podman.socket podman.service podman-restart.service \
        podman-auto-update.timer podman-auto-update.service
    rm -rf "$out"/var/cache/apt/* "$out"/var/lib/apt/lists/*
}

((EUID == 0)) || fail "needs root: the files of a host have owners"
"$setup_dir/packages.sh" host
key=$(sha256sum <"$setup_dir/host-root.sh" | cut -c1-16)
artefact "host-root-$suite-$key" make_root
echo "$cache/host-root-$suite-$key"
