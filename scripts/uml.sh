#!/usr/bin/env bash
# Makes a machine ready for the tests with User-Mode Linux: Linux as an ordinary process, and insmod, ip, ethtool, ping and iperf3, which it runs from here.
# Says what it does, and does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
script=uml
. scripts/packages.sh

missing=()
command -v linux.uml >/dev/null || missing+=(user-mode-linux)
command -v ip >/dev/null || missing+=(iproute2)
command -v insmod >/dev/null || [ -x /sbin/insmod ] || missing+=(kmod)
command -v ping >/dev/null || missing+=(iputils-ping)
command -v ethtool >/dev/null || [ -x /sbin/ethtool ] || missing+=(ethtool)
command -v iperf3 >/dev/null || missing+=(iperf3)
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
