#!/usr/bin/env bash
# Builds what e2e/tools/go.mod names, a Kubernetes node and its checks, into the cache, and prints the
# directory of the binaries. Long, and once: the key is what the modules are and how they are built.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

kubernetes=$(awk '$1 == "k8s.io/kubernetes" { print $2 }' "$tree/e2e/tools/go.mod")

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
    cd "$tree/e2e/tools"
    # At the lowest priority: it keeps every core busy for minutes.
    nice -n 19 go build -mod=readonly -trimpath -ldflags "-s -w $(version_flags)" -o "$out" tool
    # etcd's main package is called after its directory.
    [[ ! -e $out/server ]] || mv "$out/server" "$out/etcd"
}

key=$(cat "$tree"/e2e/tools/go.{mod,sum} "$setup_dir/kubernetes-tools.sh" | sha256sum | cut -c1-16)
artefact "kubernetes-tools-$kubernetes-$key" build_tools
echo "$cache/kubernetes-tools-$kubernetes-$key"
