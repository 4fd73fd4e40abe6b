#!/usr/bin/env bash
# Makes a machine ready for the tests with a Linux guest in QEMU, and for `virtio demo --guest=qemu`: what scripts/qemu.sh installs, busybox for
# the guest, and Debian's kernel for clouds (linux-image-cloud-amd64), which is unpacked into .venv/guest, not installed. Says what it does, and
# does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/qemu.sh
script=guest
. scripts/packages.sh
export LC_ALL=C
kernel=linux-image-cloud-amd64
place=.venv/guest

missing=()
command -v busybox >/dev/null && busybox --list | grep -qx modprobe || missing+=(busybox-static)
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"

# The package that $kernel stands for, as apt knows it.
newest() { apt-cache depends "$kernel" 2>/dev/null | awk '/Depends: linux-image-/ { print $2; exit }'; }

# apt's sandbox user cannot write into folders of others.
fetch() { (cd "$folder" && apt-get -qq -o APT::Sandbox::User=root download "$1"); }

if ! compgen -G "$place/boot/vmlinuz-*" >/dev/null; then
    command -v apt-get >/dev/null || fail "no apt: unpack Debian's $kernel into $PWD/$place, so that $place/boot/vmlinuz-* is there"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    package=$(newest)
    if [ -z "$package" ] || ! fetch "$package"; then
        say "package lists are old or empty: apt-get update"
        as_root apt-get update -qq
        package=$(newest)
        [ -n "$package" ] || fail "no $kernel among apt's packages"
        fetch "$package"
    fi
    say "unpacking $package into $place"
    rm -rf "$place" "$place.new"
    mkdir -p .venv
    dpkg-deb -x "$folder"/*.deb "$place.new"
    mv "$place.new" "$place"
fi
