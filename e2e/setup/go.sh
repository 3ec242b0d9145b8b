#!/usr/bin/env bash
# go.sh: is there a Go that builds the Kubernetes tools? Asked before anything long begins. Go 1.21 and later fetch
# the version that is needed by themselves, unless GOTOOLCHAIN says otherwise.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

wanted=$(awk '$1 == "go" { print $2 }' "$tree/e2e/tools/go.mod")
command -v go >/dev/null || fail "needs Go $wanted or newer on the PATH (Go 1.21 is enough where it may fetch that one)"
cd "$tree/e2e/tools"
if ! answer=$(go list -m 2>&1); then
    fail "$(go version) cannot build e2e/tools, which needs Go $wanted: $answer"
fi
