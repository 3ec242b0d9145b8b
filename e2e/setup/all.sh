#!/usr/bin/env bash
# Set-up for checks and guests: installs packages, and puts the guest kernel and stock virtiofsd into the cache. Writes
# their paths to target/e2e/parts, which the e2e crate and the Makefile read. Quick if everything exists.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$setup_dir/packages.sh" build check guest
kernel=$("$setup_dir/kernel.sh")
virtiofsd=$("$setup_dir/cargo-tool.sh" virtiofsd 1.14.0)

mkdir -p "$tree/target/e2e"
cat >"$tree/target/e2e/parts.new" <<PARTS
kernel=$kernel/vmlinuz
overlay_module=$kernel/overlay.ko
modules=$kernel/modules
busybox=$(command -v busybox)
qemu=$(command -v qemu-system-x86_64)
virtiofsd=$virtiofsd
PARTS
mv "$tree/target/e2e/parts.new" "$tree/target/e2e/parts"
