#!/usr/bin/env bash
# imports.sh [--edges]: fails if top-level modules of a crate import each other in a circle, or if a module that decides
# without I/O imports one that acts. `--edges` prints what imports what. It reads `crate::` paths outside of tests; what a
# module reaches through another crate or a re-export does not count.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

crates=(crds operator daemonset/agent daemonset/broker daemonset/engine daemonset/remedy daemonset/client daemonset/contract daemonset/dropin)

# Modules of pure decisions and plain data, and the only modules that they may import.
pure=(
    "daemonset/agent model:"
    "daemonset/agent decide: model"
)

# Prints "MODULE IMPORTED" for each import of a crate. A file's own tests, at its end, and files of tests do not count.
edges() {
    local src=$1/src
    find "$src" -name '*.rs' ! -path '*/tests/*' ! -path '*/bin/*' ! -name tests.rs ! -name fixtures.rs ! -name main.rs ! -name lib.rs |
        sort | while read -r file; do
        local module=${file#"$src"/}
        module=${module%%/*}
        awk -v module="${module%.rs}" '
            /^#\[cfg\(test\)\]/ { exit }
            /^ *\/\// { next }
            {
                line = $0
                while (match(line, /crate::(\{[^}]*\}|[a-z_0-9]+)/)) {
                    found = substr(line, RSTART + 7, RLENGTH - 7)
                    line = substr(line, RSTART + RLENGTH)
                    gsub(/[{}]/, "", found)
                    count = split(found, names, /, */)
                    for (i = 1; i <= count; i++) {
                        sub(/::.*/, "", names[i])
                        if (names[i] ~ /^[a-z_0-9]+$/ && names[i] != module) print module, names[i]
                    }
                }
            }' "$file"
    done | sort -u | modules_of "$src"
}

# Only what is a module: a crate also exports types and functions at its root.
modules_of() {
    local from to
    while read -r from to; do
        if [[ -e $1/$to.rs || -d $1/$to ]]; then echo "$from $to"; fi
    done
}

failed=0
for crate in "${crates[@]}"; do
    found=$(edges "$crate")
    [[ -n $found ]] || { echo "imports: no import found in $crate: is this script still right?" >&2; exit 1; }
    if [[ ${1:-} == --edges ]]; then
        while read -r edge; do echo "$crate: $edge"; done <<<"$found"
        continue
    fi
    # tsort names the members of a circle.
    if ! circle=$(tsort <<<"$found" 2>&1 >/dev/null); then
        printf '%s: modules import each other in a circle:\n%s\n' "$crate" "$circle" >&2
        failed=1
    fi
    for rule in "${pure[@]}"; do
        [[ $rule == "$crate "* ]] || continue
        module=${rule#"$crate "}
        allowed=" ${module#*:} "
        while read -r from to; do
            if [[ $from == "${module%%:*}" && $allowed != *" $to "* ]]; then
                echo "$crate: $from decides without I/O and must not import $to" >&2
                failed=1
            fi
        done <<<"$found"
    done
done
exit "$failed"
