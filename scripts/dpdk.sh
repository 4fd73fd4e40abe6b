#!/usr/bin/env bash
# Makes a machine ready for the tests with DPDK: testpmd, with DPDK's own ends of vhost-user. Says what it does, and does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
script=dpdk
. scripts/packages.sh

command -v dpdk-testpmd >/dev/null || install_packages dpdk-dev
