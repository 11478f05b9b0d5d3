# hyperinit: `make help` lists what there is. Everything made is below target/ and .cache/; nothing is installed but
# Debian packages; for `make test` programs are built into .cache/tools: scripts/deny, scripts/fuzz, scripts/vsock.

# cargo uses every processor by itself; of apt there can be one.
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

# Static binaries need the triple spelled out (.cargo/config.toml), so it is in every path.
triple := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
target := $(or $(CARGO_TARGET_DIR),target)
bin := $(target)/$(triple)/release
hyperctl := $(bin)/hyperctl
cache := .cache

# Tests make namespaces, so their binaries run as root; the build stays the caller's.
ifneq ($(shell id -u),0)
runner := CARGO_TARGET_$(shell echo $(triple) | tr 'a-z-' 'A-Z_')_RUNNER='sudo -E'
endif

# Beside QEMU 7.2 in qemu-system-common, later a package of its own.
virtiofsd := test -x /usr/lib/qemu/virtiofsd || scripts/need virtiofsd

# tests/minimal runs these whole, while it records the processes that they start: once is enough.
recorded := execd mountd netd pod resilience streamd
tests := $(filter-out $(recorded),$(patsubst tests/%.rs,%,$(wildcard tests/*.rs)) $(patsubst tests/%/main.rs,%,$(wildcard tests/*/main.rs)))

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile | expand -t 24

.PHONY: run
run: initrd rootfs ## boots a VM and runs a container that says where it is
	@scripts/need qemu-system-x86 qemu-system-common
	@$(virtiofsd)
	$(hyperctl) run --vm --rootfs $(cache)/rootfs -- /bin/sh -c "$$(cat scripts/where)"

.PHONY: test
test: check sizes initrd rootfs vsock test-hyperctl ## checks and tests everything
	@scripts/need qemu-system-x86 qemu-system-common e2fsprogs iproute2 mmdebstrap nftables xfsprogs
	@$(virtiofsd)
	@scripts/nfs
	@scripts/world core
	$(runner) HYPERINIT_KERNEL=$(CURDIR)/$(cache)/kernel/vmlinuz \
		cargo test --locked --workspace --lib --bins --examples $(addprefix --test ,$(tests))
	$(runner) cargo test --locked --workspace --doc
	@scripts/need g++
	scripts/fuzz $(cache)/tools quick
	scripts/deny $(cache)/tools

# How long each fuzz target runs by hand, in seconds: make fuzz seconds=600
seconds := 120

.PHONY: fuzz
fuzz: tools ## every fuzz target for two minutes, from the kept corpus
	@scripts/need g++
	scripts/fuzz $(cache)/tools $(seconds)

.PHONY: kills
kills: test-hyperctl ## a thousand helpers killed at random moments under load, and nothing lost (KILLS=N, KILLS_SEED=N)
	@scripts/need busybox-static nftables
	$(runner) KILLS=$(or $(KILLS),1000) cargo test --locked --test kills -- --nocapture

.PHONY: soak
soak: initrd rootfs test-hyperctl ## half an hour of mixed load in a VM, and nobody in it has grown (SOAK=SECONDS)
	@scripts/need qemu-system-x86
	$(runner) SOAK=$(or $(SOAK),1800) cargo test --locked --test soak -- --nocapture

.PHONY: world
world: initrd test-hyperctl ## every program of tests/world, in a chroot, in namespaces and in VMs: `make test` runs the smaller ones
	@scripts/need qemu-system-x86 qemu-system-common iproute2 mmdebstrap
	@scripts/world all
	$(runner) WORLD=all cargo test --locked --test world -- --include-ignored

.PHONY: waiting
waiting: initrd test-hyperctl ## a hundred starts, execs and kills beside each thing that holds up a container, and how long they took
	@scripts/need qemu-system-x86 qemu-system-common e2fsprogs
	@scripts/nfs
	$(runner) BESIDE=100 cargo test --locked --test waiting --test storage -- --nocapture --test-threads 1 holds_up nobody_waits

.PHONY: minimal
minimal: test-hyperctl ## what the policies allow is used: the part of `make test` that records processes, alone
	@scripts/need busybox-static e2fsprogs iproute2 nftables xfsprogs
	$(runner) cargo test --locked --test minimal

.PHONY: check
check: tools ## the format, the width of comments and the lints, without a test
	cargo fmt --all --check
	scripts/columns
	cargo clippy --locked --workspace --all-targets -- -D warnings
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --locked --manifest-path fuzz/Cargo.toml --target-dir $(target)/fuzz --all-targets -- -D warnings

.PHONY: build
build: tools ## the guest's program and hyperctl, optimised
	cargo build --locked --release -p hyperinit --bin hyperinit -p hyperctl --bin hyperctl

# Tests start guests with hyperctl, and cargo builds a package's program only for tests of that package.
.PHONY: test-hyperctl
test-hyperctl: tools
	cargo build --locked -p hyperctl

.PHONY: sizes
sizes: build ## fails if the guest's program is too large
	scripts/sizes $(bin)/hyperinit

.PHONY: kernel
kernel: ## Debian's kernel and its modules in .cache/kernel, not installed
	@scripts/need kmod
	@scripts/kernel

.PHONY: guest-kernel
guest-kernel: build ## the guest's own kernel in .cache/guest-kernel, which `run`, `up` and `bench` then take: minutes, once
	scripts/guest-kernel $(hyperctl)
	$(hyperctl) initrd -o $(cache)/guest-kernel/initrd.img

.PHONY: guest-kernel-test
guest-kernel-test: guest-kernel initrd rootfs vsock test-hyperctl ## VMs of that kernel run the scenarios, and from inside it is what policy/kernel says
	@scripts/need qemu-system-x86 qemu-system-common e2fsprogs iproute2 nftables xfsprogs
	@$(virtiofsd)
	@scripts/nfs
	$(runner) HYPERINIT_KERNEL=$(CURDIR)/$(cache)/guest-kernel/vmlinuz cargo test --locked \
		--test escape --test hotplug --test network --test storage --test transports --test vm
	$(runner) cargo test --locked --test guest_kernel -- --ignored

.PHONY: rootfs
rootfs: ## a busybox root for containers in .cache/rootfs
	@scripts/need busybox-static
	@scripts/rootfs

.PHONY: vsock
vsock: tools ## the vsock device for VMs, in .cache/tools
	@scripts/vsock $(cache)/tools

.PHONY: initrd
initrd: build kernel ## the guest's initramfs, .cache/initrd.img
	$(hyperctl) initrd --modules $(cache)/kernel/modules/* -o $(cache)/initrd.img
	@[ ! -e $(cache)/guest-kernel/vmlinuz ] || $(hyperctl) initrd -o $(cache)/guest-kernel/initrd.img

.PHONY: bench
bench: initrd rootfs floor ## the numbers beside their floors, as JSON
	@scripts/need qemu-system-x86
	$(hyperctl) bench

.PHONY: bench-peers
bench-peers: build rootfs ## how long `run` and `exec` take in namespaces beside those of runc, as JSON
	@scripts/peers
	$(if $(runner),sudo) $(hyperctl) bench --local --peer $(cache)/peers/runc

.PHONY: floor
floor: tools
	cargo build --locked --release -p hyperinit --bin floor

.PHONY: clean
clean: ## removes all that was made, the kernel too
	@[ ! -e $(cache)/world ] || [ "$$(id -u)" = 0 ] || sudo rm -rf $(cache)/world
	rm -rf $(target) $(cache)

# What the build itself needs. Rust comes by rustup: Debian's may be older than rust-version in Cargo.toml.
.PHONY: tools
tools:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust with rustup (rust-toolchain.toml)" >&2; exit 1; }
	@scripts/need gcc libc6-dev
