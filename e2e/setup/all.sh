#!/usr/bin/env bash
# The set-up for checks and guests: packages, guest kernel, stock virtiofsd as the peer. Writes where the
# parts are to target/e2e/parts, which the e2e crate and the Makefile read. Quick when there is nothing to do.
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
