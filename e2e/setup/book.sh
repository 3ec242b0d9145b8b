#!/usr/bin/env bash
# book.sh: makes a web site of README and documents in target/book. Fails if docs/SUMMARY.md lacks a document, or if a link
# leads to a file that is not on the site.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

source=$tree/target/book-source
site=$tree/target/book

# As in the repository, so that links between documents are right. The summary has to be at the top.
lay_out() {
    local file
    rm -rf "$source" "$site"
    mkdir -p "$source"
    for file in README.md CHANGELOG.md CONTRIBUTING.md LICENSE docs charts/virtiofs-operator deploy/vhost-user; do
        mkdir -p "$source/$(dirname "$file")"
        cp -r "$tree/$file" "$source/$file"
    done
    sed 's,](,](docs/,; s,](docs/\.\./,](,' "$source/docs/SUMMARY.md" >"$source/SUMMARY.md"
    rm "$source/docs/SUMMARY.md"
}

unlisted() {
    local file
    for file in $(cd "$source" && find docs -name '*.md'); do
        grep -q "]($file)" "$source/SUMMARY.md" || echo "docs/SUMMARY.md lacks $file"
    done
}

dead_links() {
    local page link
    while IFS=: read -r page link; do
        link=${link#href=\"} link=${link%%[#\"]*}
        case $link in '' | *://* | mailto:*) continue ;; esac
        [[ -e $(dirname "$page")/$link ]] || echo "${page#"$site"/} has a link to $link"
    done < <(grep -roE --include='*.html' 'href="[^"]*"' "$site")
}

main() {
    local mdbook problems
    mdbook=$("$setup_dir/cargo-tool.sh" mdbook 0.5.4)
    lay_out
    "$mdbook" build "$tree" >&2
    problems=$(unlisted; dead_links)
    [[ -z $problems ]] || fail "$problems"
    echo "$site/index.html"
}

main
