#!/usr/bin/env bash
# image.sh PROFILE: builds the container image of the programs in target/PROFILE (`release` or `debug`) with podman, from
# files of this host only, as localhost/virtiofs-operator:VERSION, and writes it as an OCI archive to
# target/image/virtiofs-operator.tar. Does nothing when that is what it was made of. The image contains its bill of materials.
#
# image.lock has the Debian packages and hashes of the libraries of a release. A release image is built with exactly these, so
# that it does not depend on whose machine builds it; `image.sh release --lock` rewrites the file, for a commit that says
# what has changed. An image for tests has the libraries of this machine.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

programs=(virtiofs-operator virtiofs-agent virtiofs-broker virtiofs-keeper virtiofs-engine virtiofsctl virtiofs-kubevirt-hook)
built=$tree/target/${1:-release}
out=$tree/target/image
archive=$out/virtiofs-operator.tar
lock=$setup_dir/image.lock
version=$(sed -n 's/^appVersion: //p' "$tree/charts/virtiofs-operator/Chart.yaml")
image=localhost/virtiofs-operator:$version

# Every file of the image: the programs, the libraries they are linked with, and the loader.
put_together() {
    local root=$1 program library
    mkdir -p "$root/usr/bin"
    for program in "${programs[@]}"; do
        # What explains a fault is in the build's own files; in an image it is most of the size.
        strip -o "$root/usr/bin/$program" "$built/$program" || fail "no program $built/$program: build it first"
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
        [[ $built == */debug ]] || fail "other libraries than e2e/setup/image.lock has; build with its packages, or update it:
    e2e/setup/image.sh release --lock"
        say "the image for tests has libraries of this machine"
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
    # shellcheck disable=SC2064 # this very directory
    trap "rm -rf '$context'" EXIT
    put_together "$context/root"
    check_libraries "$context/root" "${1:-}"
    mkdir -p "$context/root/usr/share/doc/virtiofs-operator"
    "$setup_dir/sbom.sh" "$context/root" "$version" >"$context/root/usr/share/doc/virtiofs-operator/sbom.spdx.json"
    cp "$context/root/usr/share/doc/virtiofs-operator/sbom.spdx.json" "$out/"
    if [[ -e $archive && $(key "$context/root") == "$(cat "$out/key" 2>/dev/null)" ]]; then
        return
    fi
    rm -f "$archive" "$out/key"
    # The same files make the same image. No container runs for it, so no cgroup is needed.
    podman --cgroup-manager=cgroupfs build --quiet --timestamp 0 --file "$tree/Containerfile" --tag "$image" "$context" >&2
    podman save --quiet --format oci-archive --output "$archive" "$image" >&2
    key "$context/root" >"$out/key"
    say "$image: $(du -h "$archive" | cut -f1) in $archive"
}

main "${2:-}"
