#!/usr/bin/env bash
# Makes a machine ready for the tests with User-Mode Linux: Linux as an ordinary process, and insmod, ip and ping, which it runs from here. Says what it
# does, and does nothing twice.
set -euo pipefail
cd "$(dirname "$0")/.."
script=uml
. scripts/packages.sh

missing=()
command -v linux.uml >/dev/null || missing+=(user-mode-linux)
command -v ip >/dev/null || missing+=(iproute2)
command -v insmod >/dev/null || [ -x /sbin/insmod ] || missing+=(kmod)
command -v ping >/dev/null || missing+=(iputils-ping)
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"

# linux.uml 6.1 fails on processors with AMX without this.
library=.venv/uml-xstate.so
if [ tests/uml/xstate.c -nt "$library" ]; then
    mkdir -p .venv
    cc -shared -fPIC -O1 -o "$library" tests/uml/xstate.c
fi
