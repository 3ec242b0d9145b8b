#!/usr/bin/env bash
# sbom.sh ROOT VERSION: prints the bill of materials (SPDX 2.3) of an image's root directory: the Debian package of each
# library in ROOT with the library's hash, and each crate that the programs contain, as in Cargo.lock.
# sbom.sh --libraries ROOT: prints "SHA256 PATH PACKAGE VERSION" for each library, the format of image.lock.
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

crates=(virtiofs-operator virtiofs-agent virtiofs-broker virtiofs-engine virtiofsctl virtiofs-kubevirt-hook)

libraries() {
    local root=$1 file path package
    find "$root" -name '*.so*' -type f | LC_ALL=C sort | while read -r file; do
        path=${file#"$root"}
        # With a merged /usr, packages list the file by either path.
        package=$(dpkg-query -S "$path" "$(realpath "$path")" "/usr$path" 2>/dev/null | head -n 1 | cut -d: -f1) || true
        [[ -n $package ]] || fail "$path: in no Debian package; an image contains libraries of packages only"
        printf '%s %s %s %s\n' "$(sha256sum <"$file" | cut -d' ' -f1)" "$path" "$package" \
            "$(dpkg-query -W -f '${Version}' "$package:$(dpkg --print-architecture)")"
    done
}

# "NAME VERSION SHA256" of each crate from the registry that a program contains.
linked_crates() {
    local packages=()
    for crate in "${crates[@]}"; do packages+=(-p "$crate"); done
    (cd "$tree" && cargo tree --locked --edges normal --prefix none --format '{p}' "${packages[@]}") |
        sed -nE 's/^([^ ]+) v([^ ]+)( \(proc-macro\))?( \(\*\))?$/\1 \2/p' | LC_ALL=C sort -u |
        awk 'NR == FNR { if (/^name = /) name = $3; if (/^version = /) version = $3; if (/^checksum = /) sum[name " " version] = $3; next }
             { key = "\"" $1 "\" \"" $2 "\""; gsub(/"/, "", sum[key]); print $1, $2, sum[key] }' "$tree/Cargo.lock" -
}

document() {
    local root=$1 version=$2 found
    found=$( { libraries "$root" | sed 's/^/deb /'; linked_crates | sed 's/^/cargo /'; } )
    awk -v version="$version" -v key="$(sha256sum <<<"$found" | cut -c1-16)" '
        function package(id, name, release, purl, algorithm, sum) {
            printf "%s\n    {\"SPDXID\": \"SPDXRef-%s\", \"name\": \"%s\", \"versionInfo\": \"%s\", ", separator, id, name, release
            printf "\"downloadLocation\": \"NOASSERTION\", \"filesAnalyzed\": false,\n"
            if (sum != "") printf "     \"checksums\": [{\"algorithm\": \"%s\", \"checksumValue\": \"%s\"}],\n", algorithm, sum
            printf "     \"externalRefs\": [{\"referenceCategory\": \"PACKAGE-MANAGER\", \"referenceType\": \"purl\", "
            printf "\"referenceLocator\": \"%s\"}]}", purl
            separator = ","
        }
        BEGIN {
            print "{\n  \"spdxVersion\": \"SPDX-2.3\", \"dataLicense\": \"CC0-1.0\", \"SPDXID\": \"SPDXRef-DOCUMENT\","
            printf "  \"name\": \"virtiofs-operator-%s\",\n", version
            printf "  \"documentNamespace\": \"https://virtiofs.dev/sbom/virtiofs-operator-%s-%s\",\n", version, key
            # The document is reproducible.
            print "  \"creationInfo\": {\"created\": \"1970-01-01T00:00:00Z\", \"creators\": [\"Tool: sbom.sh\"]},"
            printf "  \"packages\": ["
            package("image", "virtiofs-operator", version, "pkg:oci/virtiofs-operator@" version)
            relations = "    {\"spdxElementId\": \"SPDXRef-DOCUMENT\", \"relationshipType\": \"DESCRIBES\", \"relatedSpdxElement\": \"SPDXRef-image\"}"
        }
        $1 == "deb" {
            id = $4; files[id] = files[id] (files[id] ? ", " : "") $3 " sha256:" $2; release[id] = $5
        }
        $1 == "cargo" {
            id = "cargo-" $2 "-" $3; gsub(/[^A-Za-z0-9.-]/, "-", id)
            package(id, $2, $3, "pkg:cargo/" $2 "@" $3, "SHA256", $4); contained[++count] = id
        }
        END {
            for (name in release) {
                id = "deb-" name; gsub(/[^A-Za-z0-9.-]/, "-", id)
                package(id, name, release[name], "pkg:deb/debian/" name "@" release[name]); contained[++count] = id
                annotations = annotations (annotations ? "," : "") "\n    {\"annotator\": \"Tool: sbom.sh\", \"annotationDate\": \"1970-01-01T00:00:00Z\", \"annotationType\": \"OTHER\", \"comment\": \"" name ": " files[name] "\"}"
            }
            print "\n  ],\n  \"annotations\": [" annotations "\n  ],\n  \"relationships\": ["
            printf "%s", relations
            for (i = 1; i <= count; i++) printf ",\n    {\"spdxElementId\": \"SPDXRef-image\", \"relationshipType\": \"CONTAINS\", \"relatedSpdxElement\": \"SPDXRef-%s\"}", contained[i]
            print "\n  ]\n}"
        }' <<<"$found"
}

case ${1:-} in
--libraries) libraries "$2" ;;
*) document "$1" "$2" ;;
esac
