#!/usr/bin/env bash
# image.sh PROFILE: builds the container image of the programs in target/PROFILE (`release` or `debug`) with podman, from
# files of this host only, as localhost/virtiofs-operator:VERSION, and writes it as an OCI archive to
# target/image/virtiofs-operator.tar. Does nothing when that is what it was made of.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

programs=(virtiofs-operator virtiofs-agent virtiofs-broker virtiofs-keeper virtiofs-engine virtiofsctl virtiofs-kubevirt-hook)
built=$tree/target/${1:-release}
out=$tree/target/image
archive=$out/virtiofs-operator.tar
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

main
