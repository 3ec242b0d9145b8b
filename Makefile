# The tasks of this project. Each brings its own set-up: on a fresh Debian-like machine with Rust, and with Go for
# `test`, `api` and `tools-kubernetes`, every one of them works as the first command after a clone.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# CI builds exactly what Cargo.lock says; at a desk cargo may add what a changed Cargo.toml needs.
LOCKED := $(if $(CI),--locked)
SETUP := e2e/setup
# Stock virtiofsd, the peer of component tests and benchmarks, where set-up put it.
STOCK = VIRTIOFSD_STOCK=$$(sed -n 's/^virtiofsd=//p' target/e2e/parts)
STEP = @printf '\n==> %s\n' "$(1)"

# Where the parts of this project look for each other, whatever is configured for other projects.
export CARGO_TARGET_DIR := $(CURDIR)/target

# Logs explain a failing guest test; backtraces of the error itself only hide them.
export RUST_LIB_BACKTRACE := 0

# Tests that need what this machine lacks fail. VIRTIOFS_ALLOW_SKIP=1 allows them to be skipped; they are listed here.
export VIRTIOFS_SKIPPED := $(CURDIR)/target/skipped-tests

.NOTPARALLEL:
.PHONY: help api-oldest advisories forget-skips setup setup-build setup-go tools-node tools-kubernetes image packages book podman libvirt api node host scale build check words kills test guest rules demo upgrade bench chaos fuzz generate

help: ## lists these tasks
	@sed -n 's/^\([a-z0-9.-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 25

setup: ## packages, guest kernel, stock virtiofsd: what builds and guests need
	@$(SETUP)/all.sh

setup-go:
	@$(SETUP)/go.sh

setup-build:
	@$(SETUP)/packages.sh build

tools-node:
	@$(SETUP)/packages.sh node

tools-kubernetes: tools-node ## a Kubernetes node: packages, and its programs from Go modules (9 minutes on 2 cores, once)
	@$(SETUP)/kubernetes-tools.sh

build: setup-build ## release binaries of agent, broker, keeper, engine, virtiofsd-live and virtiofsctl in target/release
	$(call STEP,build)
	@cargo build $(LOCKED) --release -p virtiofs-agent -p virtiofs-broker -p virtiofs-keeper -p virtiofs-engine -p virtiofs-dropin -p virtiofsctl

packages: build ## .deb and .rpm for a host with systemd, in target/packages
	$(call STEP,packages)
	@$(SETUP)/packages.sh packages
	@$(SETUP)/host-packages.sh

book: setup-build ## README and documents as a web site in target/book; fails on links to files that are not there
	$(call STEP,book)
	@$(SETUP)/book.sh

image: setup-build tools-node ## container image of all programs and its SBOM in target/image; PROFILE=debug for tests
	$(call STEP,image)
	@cargo build $(LOCKED) -q $(if $(filter debug,$(PROFILE)),,--release) \
	    -p virtiofs-operator -p virtiofs-agent -p virtiofs-broker -p virtiofs-keeper -p virtiofs-engine -p virtiofs-dropin -p virtiofsctl -p virtiofs-kubevirt-hook
	@$(SETUP)/image.sh $(if $(filter debug,$(PROFILE)),debug,release)

check: setup ## format, lints, words, unit and component tests, generated files, dependencies
	$(call STEP,format)
	@cargo fmt --all --check
	$(call STEP,lints)
	@shellcheck $(SETUP)/*.sh deploy/packages/services deploy/packages/debian/p* e2e/host/shell e2e/host/serve-root e2e/host/podman e2e/host/libvirt e2e/host/guest-init .ci/run .ci/words.sh .ci/imports.sh
	@cargo clippy $(LOCKED) --workspace --all-targets --features virtiofs-engine/die-at-store,virtiofs-operator/die-at-write -- -D warnings
	$(call STEP,words)
	@$(MAKE) --no-print-directory words
	$(call STEP,imports)
	@.ci/imports.sh
	$(call STEP,unit and component tests)
	@$(STOCK) cargo test $(LOCKED) --workspace --exclude e2e
	@cargo test $(LOCKED) -p e2e --lib
	$(call STEP,generated files)
	@cargo run $(LOCKED) -q -p virtiofs-crds --bin crdgen -- --check
	$(call STEP,dependencies)
	@deny=$$($(SETUP)/cargo-tool.sh cargo-deny 0.20.2) && "$$deny" --log-level warn check bans licenses sources

advisories: setup-build ## dependencies with known vulnerabilities; needs github.com, where the RustSec database is
	$(call STEP,advisories)
	@deny=$$($(SETUP)/cargo-tool.sh cargo-deny 0.20.2) && "$$deny" --log-level warn check advisories

words: ## fails on words of the project's former private vocabulary; .ci/words.sh --count counts them
	@.ci/words.sh

guest: setup build ## the tests that boot real guests in QEMU
	$(call STEP,guests)
	@cargo test $(LOCKED) -p e2e --test 'guest_*' -- --show-output

api: setup-build tools-kubernetes ## the operator against a real API server; KUBECONFIG=FILE for a cluster of yours; API='name' for some tests
	$(call STEP,chart)
	@tools=$$($(SETUP)/kubernetes-tools.sh) && "$$tools/helm" lint --strict charts/virtiofs-operator
	$(call STEP,API server)
	@cargo build $(LOCKED) -q -p virtiofs-operator --features die-at-write
	@cargo build $(LOCKED) -q -p virtiofs-agent -p virtiofs-broker -p virtiofs-keeper -p virtiofs-engine
	@$(if $(filter oldest,$(KUBERNETES)),export KUBERNETES_CONTROL_PLANE=$$($(SETUP)/kubernetes-tools.sh tools-oldest) &&) \
	    KUBERNETES_TOOLS=$$($(SETUP)/kubernetes-tools.sh) cargo test $(LOCKED) -p e2e --test api -- $(API)

# What depends on the API server: its rules, its admission, and what the operator may write.
OLDEST := validates documented immutable accepts_the_chart writes_exports consumer_labels minimal_permissions exports_and_a_status foreign_exports

api-oldest: ## part of it on the oldest supported Kubernetes, 1.32, which is built once
	@$(MAKE) --no-print-directory api KUBERNETES=oldest API='$(OLDEST)'

node: setup tools-kubernetes ## all of it on a real node: kubelet, containerd, VMs in pods (root); NODE='name' for some tests
	@$(MAKE) --no-print-directory image PROFILE=debug
	$(call STEP,node)
	@KUBERNETES_TOOLS=$$($(SETUP)/kubernetes-tools.sh) cargo test $(LOCKED) -p e2e --test node -- $(NODE)

host: setup packages ## a Debian host with systemd as a VM (root): the README and the manual done word for word; HOST='name' for some tests
	$(call STEP,host)
	@$(SETUP)/host-packages.sh 2 >/dev/null
	@cargo build $(LOCKED) -q -p testkit --bin workload
	@HOST_ROOT=$$($(SETUP)/host-root.sh) cargo test $(LOCKED) -p e2e --test host -- $(HOST)

scale: setup-build tools-kubernetes ## figures of the operator with 1000 nodes and 10 shares; SCALE='--nodes 100 --quiet 60' for less
	$(call STEP,scale)
	@cargo build $(LOCKED) -q --release -p virtiofs-operator
	@cargo build $(LOCKED) -q -p e2e --bin scale
	@KUBERNETES_TOOLS=$$($(SETUP)/kubernetes-tools.sh) VIRTIOFS_OPERATOR=target/release/virtiofs-operator target/debug/scale $(SCALE)

kills: setup-build ## each operation, its engine dying before each single store to the ledger; brokers dying between any two effects
	$(call STEP,deaths between any two stores)
	@$(SETUP)/some-test.sh cargo test $(LOCKED) -p virtiofs-engine --features die-at-store --test engine_process kill_at_store
	$(call STEP,deaths of the broker between any two effects)
	@$(SETUP)/some-test.sh cargo test $(LOCKED) -p virtiofs-broker --features die-at-step --test steps guest_survives

libvirt: setup build ## starts a libvirt domain with what virtiofsctl status prints (root)
	$(call STEP,libvirt)
	@part() { sed -n "s/^$$1=//p" target/e2e/parts; }; root=$$($(SETUP)/host-root.sh) && \
	    unshare --mount --propagation private e2e/host/libvirt "$$root" "$$(part kernel)" "$$(part busybox)" target/release

podman: setup tools-node ## deploy/podman on this machine (root): the pod and the units, restarted under a guest
	@$(MAKE) --no-print-directory image PROFILE=debug
	$(call STEP,podman)
	@cargo build $(LOCKED) -q -p testkit --bin workload
	@root=$$($(SETUP)/host-root.sh) && unshare --mount --propagation slave e2e/host/podman \
	    "$$root/usr/lib/systemd/system-generators/podman-system-generator" target/debug/workload target/debug/virtiofsctl

rules: tools-kubernetes ## alerts are valid, as files and out of the chart, and each fires when it should and not when it should not
	$(call STEP,alerts)
	@tools=$$($(SETUP)/kubernetes-tools.sh) && \
	    "$$tools/promtool" check rules charts/virtiofs-operator/files/alerts.yaml && \
	    "$$tools/helm" template virtiofs charts/virtiofs-operator -s templates/alerts.yaml --set alerts.enabled=true \
	        --set alerts.runbooks=https://example.com/ | sed '1,/^spec:/d' >target/rendered-alerts.yaml && \
	    "$$tools/promtool" check rules target/rendered-alerts.yaml && \
	    "$$tools/promtool" test rules e2e/rules/alerts.test.yaml

test: forget-skips setup-go setup check kills guest host libvirt api api-oldest node podman rules ## everything that CI runs
	@touch $(VIRTIOFS_SKIPPED)
	@cat $(VIRTIOFS_SKIPPED)
	@echo "skipped tests: $$(wc -l <$(VIRTIOFS_SKIPPED))"

forget-skips:
	@mkdir -p $(dir $(VIRTIOFS_SKIPPED)) && rm -f $(VIRTIOFS_SKIPPED)

demo: setup build ## a share, a VM at work on it; engines, broker and agent killed and replaced; error count, metrics; SHARE=/some/dir
	$(call STEP,demo)
	@cargo build $(LOCKED) -q -p e2e --bin demo
	@exec target/debug/demo $(if $(SHARE),--share '$(SHARE)')

upgrade: setup ## rolls agent, broker and engine from another commit to this tree and back, in every order, under a guest; FROM=COMMIT; UPGRADE=--forward for one direction
	@test -n '$(FROM)' || { echo 'make upgrade needs FROM=COMMIT, the release to upgrade from' >&2; exit 2; }
	$(call STEP,upgrade)
	@cargo build $(LOCKED) -q -p virtiofs-agent -p virtiofs-broker -p virtiofs-keeper -p virtiofs-engine -p virtiofsctl
	@cargo build $(LOCKED) -q -p e2e --bin upgrade
	@other=$$($(SETUP)/other-release.sh '$(FROM)') && \
	    exec target/debug/upgrade --other "$$other" --present target/debug $(UPGRADE)

bench: setup build ## all figures (6 minutes): tables and target/bench/report.json; BENCH=--quick for a short run
	$(call STEP,bench)
	@$(STOCK) cargo run $(LOCKED) -q --release -p testkit --bin bench -- $(BENCH)

chaos: build ## 4000 kills and restarts of broker, keeper and engines, and hand-overs, under guests that notice everything; CHAOS='--seed 7' for others
	$(call STEP,chaos)
	@cargo run $(LOCKED) -q --release -p testkit --bin chaos -- $(CHAOS)

fuzz: setup-build ## hostile input to all parsers, mutated from fuzz/corpus; SECONDS=600 for each of them instead of 60
	$(call STEP,fuzz)
	@FUZZ_SECONDS=$(or $(SECONDS),60) $(SETUP)/some-test.sh cargo test $(LOCKED) -p virtiofs-crds -p virtiofs-keeper \
	    -p virtiofs-broker -p virtiofs-agent -p virtiofs-engine --lib --bins --test fuzz -- fuzz_ --nocapture

generate: setup-build ## rewrites the generated files
	@cargo run $(LOCKED) -q -p virtiofs-crds --bin crdgen
	@cargo run $(LOCKED) -q -p virtiofsctl -- status --schema >docs/status.schema.json
