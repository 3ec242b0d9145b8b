#!/usr/bin/env bash
# Runs a test command and fails if it ran no test: a mistyped filter matches nothing, and cargo calls that a success.
set -euo pipefail

output=$(mktemp)
trap 'rm -f "$output"' EXIT
"$@" | tee "$output"
if ! grep -Eq '^test result: ok\. [1-9]' "$output"; then
    echo "no test ran: no name matches the filter" >&2
    exit 1
fi
