#!/usr/bin/env bash
# Fails if a word of the project's former private vocabulary stands in a name or in prose, and says what to write
# instead. Matches whole words, and the parts of snake_case, CamelCase and UPPER_CASE names.
#   .ci/words.sh           prints FILE:LINE: WORD (write: ...): TEXT for each use; exit status 1 if there is any
#   .ci/words.sh --count   prints the number of uses of each word
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# WORD | alternatives as a Perl regular expression, in lower case, ~ between words | what to write
WORDS='
anew             | anew                                            | again
nought           | nought|naught                                   | zero
estate           | estate                                          | session context
deeds            | deeds?                                          | session context
bury             | bury|burie[sd]|burying|burial                   | reap
parked           | parks?|parked|parking                           | stash, fd stash
adopted          | adopts?|adopted|adopting|adoption               | orphaned
told             | told                                            | sent, reported
tell             | tells?|telling|tellings                         | send, report
mailbox          | mailbox(?:es)?                                  | channel
rung             | rungs?                                          | remedy
ladder           | ladders?                                        | escalation
senseless        | senseless                                       | invalid request
whither          | whither                                         | path
turned away      | turn(?:s|ed|ing)?~away                          | rejected
let go           | (?:let|lets|letting)~go                         | release
come to rest     | (?:come|comes|came|coming)~to~rest|at~rest      | quiesce
want of          | want~of                                         | without, missing
put off          | (?:put|puts|putting)~off                        | defer
goes on          | (?:go|goes|going|went|gone)~on                  | continue, resume
'

# FILE WORD: permitted uses; * matches anything. The changelog names what was renamed.
ALLOWED='
.ci/words.sh *
LICENSE *
Cargo.lock *
CHANGELOG.md *
'

allowed() { # FILE WORD
    local file word
    while read -r file word; do
        # shellcheck disable=SC2053 # FILE is a pattern.
        if [[ -n $file && $1 == $file && ($word == '*' || $word == "$2") ]]; then return 0; fi
    done <<<"$ALLOWED"
    return 1
}

# The word by itself, inside snake_case and UPPER_CASE, or inside CamelCase.
pattern() { # ALTERNATIVES
    local camel
    camel=$(sed -E 's/(^|\||~|\(\?:)([a-z])/\1\u\2/g; s/~//g' <<<"$1")
    printf '(?<![A-Za-z])(?i:%s)(?![A-Za-z])|(?<![A-Z])(?:%s)(?![a-z])' "${1//\~/[ _]}" "$camel"
}

status=0
while IFS='|' read -r line; do
    [[ -n $line ]] || continue
    word=$(sed -E 's/ +\| .*//' <<<"$line")
    alternatives=$(sed -E 's/^[^|]*\| (.*[^ ]) +\| .*$/\1/' <<<"$line")
    write=$(sed -E 's/.* \| //' <<<"$line")
    count=0
    while IFS=: read -r file number text; do
        [[ -n $file ]] || continue
        if allowed "$file" "$word"; then continue; fi
        count=$((count + 1))
        status=1
        [[ ${1-} == --count ]] || printf '%s:%s: %s (write: %s):%s\n' "$file" "$number" "$word" "$write" "$text"
    done < <(git grep -InP "$(pattern "$alternatives")" || true)
    [[ ${1-} != --count ]] || printf '%6d %s\n' "$count" "$word"
done <<<"$WORDS"
[[ ${1-} == --count ]] || exit "$status"
