#!/usr/bin/env bash
# image.sh PROFILE [--lock]: builds the container image of the programs in target/PROFILE (`release` or `debug`) with
# podman as localhost/virtiofs-operator:VERSION, and writes it as an OCI archive to target/image/virtiofs-operator.tar.
# It uses files of this host only. Does nothing if the archive is up to date. The image contains its bill of materials.
#
# image.lock lists the Debian packages and hashes of the libraries of a release. A release image is built with exactly
# these libraries, so that it does not depend on the machine. `image.sh release --lock` updates the file; the commit
# message says what changed. An image for tests has the libraries of this machine.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

programs=(virtiofs-operator virtiofs-agent virtiofs-broker virtiofs-keeper virtiofs-engine virtiofsd-live virtiofsctl virtiofs-kubevirt-hook)
built=$tree/target/${1:-release}
out=$tree/target/image
archive=$out/virtiofs-operator.tar
lock=$setup_dir/image.lock
version=$(sed -n 's/^appVersion: //p' "$tree/charts/virtiofs-operator/Chart.yaml")
image=localhost/virtiofs-operator:$version

# Copies the files of the image: the programs, the libraries that they are linked with, and the loader.
copy_files() {
    local root=$1 program library
    mkdir -p "$root/usr/bin"
    for program in "${programs[@]}"; do
        # Debug information stays in the build directory; it would be most of the image's size.
        strip -o "$root/usr/bin/$program" "$built/$program" || fail "$built/$program: no such program; build it first"
    done
    ldd "$root"/usr/bin/* | grep -o '/lib[^ ]*' | sort -u | while read -r library; do
        install -D -m 755 "$library" "$root$library"
    done
}

check_libraries() {
    local found
    found=$("$setup_dir/sbom.sh" --libraries "$1")
    if [[ ${2:-} == --lock ]]; then
        echo "$found" >"$lock"
    elif [[ $(<"$lock") != "$found" ]]; then
        diff -u --label image.lock --label "this machine" "$lock" - <<<"$found" >&2 || true
        [[ $built == */debug ]] || fail "libraries differ from e2e/setup/image.lock; build with its packages, or update it:
    e2e/setup/image.sh release --lock"
        say "test image: uses the libraries of this machine"
    fi
}

key() {
    (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum; sha256sum <"$tree/Containerfile"; echo "$image")
}

main() {
    local context
    command -v podman >/dev/null || fail "needs podman: e2e/setup/packages.sh node installs it"
    mkdir -p "$out"
    context=$(mktemp -d "$out/context.XXXXXX")
    # shellcheck disable=SC2064 # expand now
    trap "rm -rf '$context'" EXIT
    copy_files "$context/root"
    check_libraries "$context/root" "${1:-}"
    mkdir -p "$context/root/usr/share/doc/virtiofs-operator"
    "$setup_dir/sbom.sh" "$context/root" "$version" >"$context/root/usr/share/doc/virtiofs-operator/sbom.spdx.json"
    cp "$context/root/usr/share/doc/virtiofs-operator/sbom.spdx.json" "$out/"
    if [[ -e $archive && $(key "$context/root") == "$(cat "$out/key" 2>/dev/null)" ]]; then
        return
    fi
    rm -f "$archive" "$out/key"
    # The build is reproducible: timestamp 0. It runs no container and needs no cgroup.
    podman --cgroup-manager=cgroupfs build --quiet --timestamp 0 --file "$tree/Containerfile" --tag "$image" "$context" >&2
    podman save --quiet --format oci-archive --output "$archive" "$image" >&2
    key "$context/root" >"$out/key"
    say "$image: $(du -h "$archive" | cut -f1) in $archive"
}

main "${2:-}"
