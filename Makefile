# Targets are told by `make help`. Everything is made inside this folder (.venv, target, dist); system packages only where some are missing.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
# A plain cargo build of the binding must not look for a Python to link with; the same value everywhere spares rebuilding it.
export PYO3_BUILD_EXTENSION_MODULE := 1
export PYO3_PYTHON := $(CURDIR)/.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

FUZZ_SECONDS ?= 600
# A stage that takes long says where.
PYTEST := pytest --durations=10 --durations-min=3
CHECK := setup format clippy rust develop lint types stubs python
TEST := $(CHECK) qemu-tools peers uml-tools uml guest-tools guest dpdk-tools dpdk libvirt-tools libvirt loom tsan fuzz-minute slow

.PHONY: help check test fix demo wheel bench fuzz clean \
        setup format clippy rust develop lint types stubs python qemu-tools peers uml-tools uml guest-tools guest dpdk-tools dpdk libvirt-tools libvirt loom tsan fuzz-tool fuzz-minute slow

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check: ## the quick loop: format, lints, types, Rust and Python tests
	@scripts/stages.sh $(CHECK)

test: ## everything: check, QEMU's devices, loom, ThreadSanitizer, a minute of fuzzing, the packages
	@scripts/stages.sh $(TEST)

fix: setup ## format everything, and mend what ruff can
	cargo fmt --all
	ruff check --quiet --fix
	ruff format --quiet

demo: setup qemu-tools uml-tools guest-tools ## set up, build for speed, then the session of `virtio demo`: our own device, QEMU's, and Linux guests on ours
	PIP_QUIET=1 maturin develop --quiet --release --locked
	virtio demo --seconds 3
	virtio demo --qemu --seconds 3
	virtio demo --guest --seconds 3
	virtio demo --guest=qemu --seconds 3

wheel: setup ## wheel (abi3, manylinux_2_28) and sdist into dist/
	scripts/wheel.sh dist

bench: setup ## benchmarks, Rust and Python, built for speed (see benches/README.md)
	PIP_QUIET=1 maturin develop --quiet --release --locked
	cargo bench --locked --package virtqueue
	pytest benches

fuzz: setup fuzz-tool ## fuzz each target for FUZZ_SECONDS (600)
	scripts/fuzz.sh $(FUZZ_SECONDS)

loom: setup ## the loom model of publish, arm and decide, and of its fences
	scripts/loom.sh

tsan: setup ## the two-thread ring test under ThreadSanitizer
	scripts/tsan.sh

clean: ## remove what was built
	rm -rf target rust/fuzz/{target,corpus,artifacts} benches/peers/rings/target dist .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache .benchmarks python/virtio/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stages of check and test.

setup: ## system packages and development tools, where missing
	@scripts/setup.sh

format:
	cargo fmt --all --check
	ruff format --check --quiet

clippy:
	cargo clippy --quiet --locked --workspace --all-targets -- -D warnings

rust:
	cargo test --quiet --locked --workspace

develop:
	PIP_QUIET=1 maturin develop --quiet --locked

lint:
	ruff check --quiet

types:
	mypy

stubs:
	python -m mypy.stubtest virtio._core

python: # in two processes: that halves it on two cores
	$(PYTEST) --numprocesses 2 --dist loadfile -m "not slow and not qemu and not uml and not guest and not dpdk and not libvirt"

qemu-tools: ## QEMU in two releases, ip, ping and iperf3, where missing
	@scripts/qemu.sh

peers: ## the tests against QEMU's device models
	$(PYTEST) -m qemu

uml-tools: ## User-Mode Linux, ip, ping and iperf3, where missing
	@scripts/uml.sh

uml: ## the tests in which Linux's own drivers use our devices
	$(PYTEST) -m uml

guest-tools: ## a Linux kernel and busybox for QEMU's guest, where missing
	@scripts/guest.sh

guest: ## the tests in which a Linux guest in QEMU uses our devices
	$(PYTEST) -m "guest and not slow"

dpdk-tools: ## DPDK's testpmd, Open vSwitch with DPDK, OVN, vhost-device-rng and QEMU's storage daemon, where missing
	@scripts/dpdk.sh

dpdk: ## the tests in which DPDK's driver uses our device, and our drivers DPDK's device and others
	$(PYTEST) -m dpdk

libvirt-tools: ## libvirt's daemon and its driver for QEMU, where missing
	@scripts/libvirt.sh

libvirt: ## the tests in which libvirt starts domains on our devices
	$(PYTEST) -m libvirt

fuzz-tool:
	@cargo fuzz --version >/dev/null 2>&1 || cargo install --quiet --locked --root .venv cargo-fuzz

fuzz-minute: fuzz-tool ## all fuzz targets in a minute, after each has found the fault that is planted for it
	scripts/fuzz.sh 20

slow:
	$(PYTEST) -m slow
