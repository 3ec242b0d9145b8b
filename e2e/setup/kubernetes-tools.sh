#!/usr/bin/env bash
# kubernetes-tools.sh [MODULE]: builds what e2e/MODULE/go.mod names into the cache, and prints the directory
# of the binaries. MODULE is `tools`, a Kubernetes node and its checks, or `tools-oldest`, the control plane of
# the oldest Kubernetes that is supported. Long, and once: the key is what the modules are and how they are built.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

modules=$tree/e2e/${1:-tools}
[[ -e $modules/go.mod ]] || fail "there is no $modules/go.mod; say tools or tools-oldest"
kubernetes=$(awk '$1 == "k8s.io/kubernetes" { print $2 }' "$modules/go.mod")

# The binaries must know their own version: charts and skew checks compare it, and a plain `go build`
# leaves v0.0.0-master in it.
version_flags() {
    local minor=${kubernetes#v1.} package
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        printf -- '-X %s.gitVersion=%s -X %s.gitMajor=1 -X %s.gitMinor=%s ' \
            "$package" "$kubernetes" "$package" "$package" "${minor%%.*}"
    done
}

build_tools() {
    local out=$1
    command -v go >/dev/null || fail "needs Go 1.26 or newer on the PATH"
    mkdir -p "$out"
    cd "$modules"
    # At the lowest priority: it keeps every core busy for minutes.
    nice -n 19 go build -mod=readonly -trimpath -ldflags "-s -w $(version_flags)" -o "$out" tool
    # etcd's main package is called after its directory.
    [[ ! -e $out/server ]] || mv "$out/server" "$out/etcd"
}

key=$(cat "$modules"/go.{mod,sum} "$setup_dir/kubernetes-tools.sh" | sha256sum | cut -c1-16)
artefact "kubernetes-tools-$kubernetes-$key" build_tools
echo "$cache/kubernetes-tools-$kubernetes-$key"
