#!/usr/bin/env bash
# Makes a machine ready for the tests against QEMU, and for the demo: QEMU 10 (on Debian 12 from its backports), ip, ping and iperf3 as system
# packages, and QEMU 7.2 beside it, unpacked into .venv/qemu-7.2. Says what it does, and does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
script=qemu
. scripts/packages.sh
old=.venv/qemu-7.2
export LC_ALL=C

codename=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}")

# Release of the QEMU in file $1: its first two numbers; nothing if it does not run.
release_of() { { "$1" --version 2>/dev/null || true; } | sed -n 's/^QEMU emulator version \([0-9]*\.[0-9]*\).*/\1/p'; }

# Options, URI and components of the machine's own source of release $codename, from either format of apt's lists, as one `deb` line of suite $1.
source_line() {
    local file
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -e "$file" ] || continue
        sed 's/#.*//' "$file" | awk -v codename="$codename" -v suite="$1" '
            $1 == "deb" {
                options = ""; at = 2
                if ($2 ~ /^\[/) { do options = options $(at) " "; while ($(at++) !~ /\]$/) }
                if ($(at + 1) == codename) { print "deb " options $at " " suite " main"; exit }
            }'
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        # An inline key (Signed-By over several lines) cannot stand in one line: then apt has to know the key by itself.
        sed '/^#/d' "$file" | awk -v codename="$codename" -v suite="$1" 'BEGIN { RS = ""; FS = "\n" }
            {
                uri = suites = key = ""; binary = enabled = 1
                for (line = 1; line <= NF; line++) {
                    name = tolower($line); sub(/:.*/, "", name)
                    value = $line; sub(/^[^:]*:[ \t]*/, "", value)
                    if (name == "types") binary = value ~ /(^|[ \t])deb([ \t]|$)/
                    if (name == "uris") { split(value, all, /[ \t]+/); uri = all[1] }
                    if (name == "suites") suites = " " value " "
                    if (name == "enabled" && tolower(value) == "no") enabled = 0
                    if (name == "signed-by" && value ~ /^\//) { key = value; gsub(/[ \t]+/, ",", key); key = "[signed-by=" key "] " }
                }
                if (binary && enabled && uri != "" && index(suites, " " codename " ")) { print "deb " key uri " " suite " main"; exit }
            }'
    done
}

# apt reads the backports suite from here for this call alone: the machine's own lists of sources stay as they are.
with_backports() {
    local line
    line=$(source_line bookworm-backports | head -n 1)
    [ -n "$line" ] || fail "no source of Debian bookworm among apt's own: add bookworm-backports, and install qemu-system-x86 10 from it"
    mkdir -p .venv
    { cat /etc/apt/sources.list 2>/dev/null || true; echo "$line"; } >.venv/backports.list
    apt=(apt-get -o "Dir::Etc::SourceList=$PWD/.venv/backports.list" -o APT::Default-Release=bookworm-backports)
    source=" from bookworm-backports"
    "$@"
    apt=(apt-get)
    source=""
}

install_new() {
    as_root "${apt[@]}" update -qq
    install_packages qemu-system-x86 qemu-system-common
}

# What QEMU 7.2 consists of, each package at its own newest version (a rebuild of one does not rebuild the others).
unpack_old() {
    local package version
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    for package in qemu-system-common qemu-system-data qemu-system-x86; do
        version=$(apt-cache madison "$package" | awk '$3 ~ /^1:7\.2\+/ { print $3; exit }')
        [ -n "$version" ] || fail "no $package 7.2 among apt's packages (run apt-get update)"
        (cd "$folder" && apt-get -qq -o APT::Sandbox::User=root download "$package=$version")
    done
    rm -rf "$old" "$old.new"
    for package in "$folder"/*.deb; do
        dpkg-deb -x "$package" "$old.new"
    done
    mv "$old.new" "$old"
}

missing=()
command -v ip >/dev/null || missing+=(iproute2)
command -v ping >/dev/null || missing+=(iputils-ping)
command -v iperf3 >/dev/null || missing+=(iperf3)
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"

release=$(release_of qemu-system-x86_64)
if [ -z "$release" ] || [ "${release%%.*}" -lt 8 ]; then
    if [ "$codename" = bookworm ]; then
        with_backports install_new
    else
        install_packages qemu-system-x86
    fi
    say "qemu-system-x86_64 is $(release_of qemu-system-x86_64)"
fi

if [ "$codename" = bookworm ]; then
    if [ "$(release_of "$old/usr/bin/qemu-system-x86_64")" != 7.2 ]; then
        say "unpacking QEMU 7.2 into $old"
        unpack_old
        [ "$(release_of "$old/usr/bin/qemu-system-x86_64")" = 7.2 ] || fail "QEMU 7.2 in $old does not run"
    fi
else
    say "no QEMU 7.2 beside it: that is unpacked on Debian bookworm only"
fi
