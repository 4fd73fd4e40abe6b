#!/usr/bin/env bash
# Makes a machine ready for the tests with DPDK and other people's vhost-user devices: testpmd, with DPDK's own ends of vhost-user, Open vSwitch
# with DPDK and OVN as system packages, vhost-device-rng from the cargo registry in .venv, and QEMU's storage daemon, which comes with what
# scripts/qemu.sh installs. Says what it does, and does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/qemu.sh
script=dpdk
. scripts/packages.sh

missing=()
command -v dpdk-testpmd >/dev/null || missing+=(dpdk-dev)
[ -x /usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk ] || missing+=(openvswitch-switch-dpdk)
command -v ovn-northd >/dev/null || missing+=(ovn-central)
command -v ovn-controller >/dev/null || missing+=(ovn-host)
command -v qemu-storage-daemon >/dev/null || [ -x .venv/qemu-7.2/usr/bin/qemu-storage-daemon ] || missing+=(qemu-utils)
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"

if [ ! -x .venv/bin/vhost-device-rng ]; then
    say "building vhost-device-rng into .venv"
    cargo install --quiet --locked --root .venv --version 0.1.0 vhost-device-rng
fi
