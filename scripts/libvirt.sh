#!/usr/bin/env bash
# Makes a machine ready for the tests with libvirt: what scripts/guest.sh installs, and libvirt's daemon, its driver for QEMU and virsh. The service
# (libvirt-daemon-system) is not installed: the tests start a daemon of their own. Says what it does, and does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/guest.sh
script=libvirt
. scripts/packages.sh

missing=()
command -v libvirtd >/dev/null || [ -x /usr/sbin/libvirtd ] || missing+=(libvirt-daemon)
[ -e /usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so ] || missing+=(libvirt-daemon-driver-qemu)
command -v virsh >/dev/null || missing+=(libvirt-clients)
command -v unshare >/dev/null || missing+=(util-linux)
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
