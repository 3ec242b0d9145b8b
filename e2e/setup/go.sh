#!/usr/bin/env bash
# go.sh: fails if no installed Go can build the Kubernetes tools; run before anything that takes long. Go 1.21 and later
# download the required version, unless GOTOOLCHAIN forbids it.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

wanted=$(awk '$1 == "go" { print $2 }' "$tree/e2e/tools/go.mod")
command -v go >/dev/null || fail "needs Go $wanted or newer on the PATH (Go 1.21 is enough if it may download that version)"
cd "$tree/e2e/tools"
if ! error=$(go list -m 2>&1); then
    fail "$(go version) cannot build e2e/tools, which needs Go $wanted: $error"
fi
