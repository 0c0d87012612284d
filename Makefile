# The two commands: `make demo` and `make test`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CACHE := $(or $(GOGRID_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gogrid)
# Outside the clone, so that a fresh clone builds only what differs.
export CARGO_TARGET_DIR ?= $(CACHE)/target
# A clone is built whole, and sooner so; `cargo` by hand keeps its own default.
export CARGO_INCREMENTAL ?= 0
# Fault injection is compiled into test builds only.
FEATURES := gogrid-operator/faults,gogrid-agent/faults,gogrid-worker/faults
CARGO_DENY := $(CACHE)/tools/bin/cargo-deny
CARGO_DENY_VERSION := 0.20.2
CARGO_AUDITABLE := $(CACHE)/tools/bin/cargo-auditable
CARGO_AUDITABLE_VERSION := 0.7.7

say = @printf '\n== [%(%H:%M:%S)T] %s\n' -1 '$(1)'

IMAGES ?= $(CARGO_TARGET_DIR)/images

.PHONY: help demo test soak prepare controlplane prometheus nodes build lint unit e2e deny advisories clean images demo-cluster cluster-up cluster-down

help: ## Say what there is.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: prepare controlplane ## The main job on this machine: control plane, operator, agents, a job answered on the CPU.
	$(call say,building GoGrid - first time about 10 minutes)
	@cargo build --workspace --bin gogrid-operator --bin gogrid-agent --bin gogrid-worker --bin demo --features $(FEATURES)
	@"$$CARGO_TARGET_DIR"/debug/demo

test: prepare lint controlplane prometheus nodes build unit e2e deny ## Everything that CI runs.
	$(call say,all of make test has passed)

soak: prepare controlplane build $(CARGO_AUDITABLE) ## What takes real time: leases of 40 s, minutes of idling.
	$(call say,leases of 40 s: an idle cluster and a lost node)
	@GOGRID_TEST_LEASE_SECONDS=40 cargo test --workspace --features $(FEATURES) --no-fail-fast --test idle --test crashes -- --test-threads=1 --nocapture --skip killed_before_or_after
	$(call say,the same leases: partitions - programs that stand still - struck renewals - 5 leaders killed - outages of 5 and 11 minutes)
	@GOGRID_TEST_LEASE_SECONDS=40 cargo test --workspace --features $(FEATURES) --no-fail-fast --test faults --test outage -- --test-threads=1 --nocapture
	$(call say,50 leaders killed and every write of a placement held back)
	@GOGRID_SOAK=1 cargo test --workspace --features $(FEATURES) --test faults -- --test-threads=1 --nocapture leaders
	$(call say,operator and agents killed before and after every call of five flows - 40 minutes)
	@GOGRID_SOAK=1 cargo test --workspace --features $(FEATURES) --test crashes -- --test-threads=1 --nocapture killed_before_or_after
	$(call say,the modelled store against the real API server: 10 000 operations)
	@GOGRID_STORE_OPERATIONS=10000 cargo test --workspace --features $(FEATURES) --test store_model -- --nocapture
	$(call say,shares in long windows - 200 edits of a profile in ten minutes - 10 GB pulled beside a cached file - a share that yields for a minute)
	@GOGRID_SOAK=1 cargo test --workspace --features $(FEATURES) --no-fail-fast --test share --test edits --test page_cache --test adaptive -- --test-threads=1 --nocapture
	$(call say,simulated clusters: 10 000 schedules)
	@cargo run --release -p gogrid-tests --bin sim -- --seeds 10000
	$(call say,1000 probes of a GPU driver that hang or crash - 20 minutes)
	@GOGRID_SOAK=1 cargo test --workspace --features $(FEATURES) --test nvml -- --test-threads=1 --nocapture chaos
	$(call say,images built in two folders - half an hour)
	@PATH=$(CACHE)/tools/bin:$$PATH tests/reproducible.sh
	$(call say,1 000 agents and 15 000 jobs on a real API server - 20 minutes)
	@cargo build --release -p gogrid-operator -p gogrid-tests --bin gogrid-operator --bin scale
	@"$$CARGO_TARGET_DIR"/release/scale

prepare:
	@tests/prepare.sh

controlplane:
	$(call say,control plane from pinned Go modules - first time about 15 minutes)
	@tests/controlplane/build.sh >/dev/null

prometheus:
	$(call say,promtool from a pinned Go module)
	@tests/prometheus/build.sh >/dev/null
	$(call say,the API types of five versions of Kubernetes)
	@tests/schemas/build.sh >/dev/null

# Only root can run them; everywhere else their tests say that they are skipped.
nodes:
	@if [[ $$(id -u) == 0 ]]; then \
	  printf '\n== [%(%H:%M:%S)T] kubelet, containerd, runc from pinned Go modules - first time about 5 minutes\n' -1; \
	  tests/controlplane/build.sh nodes >/dev/null; \
	else echo "SKIPPED: real nodes need root"; fi

demo-cluster: prepare controlplane nodes ## The same on two real nodes: helm install, a job, helm test, a drain, uninstall. Needs root.
	@cargo build --workspace --bins --features $(FEATURES)
	@"$$CARGO_TARGET_DIR"/debug/demo-cluster

cluster-up: prepare controlplane ## Two real nodes with GoGrid's images on this machine, to play with. Needs root.
	@cargo build --workspace --bins --features $(FEATURES)
	@"$$CARGO_TARGET_DIR"/debug/cluster up

cluster-down: ## End what cluster-up started; nothing of it is left.
	@"$$CARGO_TARGET_DIR"/debug/cluster down

images: prepare $(CARGO_AUDITABLE) ## The container images as OCI archives, without Docker: same source, same digests.
	$(call say,programs for release - first time about 15 minutes)
	@PATH=$(CACHE)/tools/bin:$$PATH charts/gogrid/images/programs.sh
	@cargo run --quiet --package gogrid-tests --bin images -- --out $(IMAGES) --programs "$$CARGO_TARGET_DIR"

# --all-targets: one set of features for programs and tests, so that nothing is built twice.
build:
	$(call say,building all programs and tests)
	@cargo build --workspace --all-targets --features $(FEATURES)

lint:
	$(call say,rustfmt)
	@cargo fmt --all --check
	$(call say,clippy on all targets - warnings are errors)
	@cargo clippy --workspace --all-targets --features $(FEATURES) -- -D warnings
	$(call say,clippy on what ships - without the faults)
	@cargo clippy --workspace -- -D warnings

unit:
	$(call say,unit and property tests)
	@cargo test --workspace --features $(FEATURES) --lib --bins

e2e:
	$(call say,end-to-end tests on a real API server)
	@tests/e2e.sh --features $(FEATURES)

deny: $(CARGO_DENY)
	$(call say,licences - bans and sources of all dependencies)
	@$(CARGO_DENY) --all-features check bans licenses sources

advisories: $(CARGO_DENY) ## Ask the advisory database about all dependencies (needs the internet).
	@$(CARGO_DENY) --all-features check advisories

$(CARGO_DENY):
	$(call say,building cargo-deny $(CARGO_DENY_VERSION) - about 5 minutes)
	@cargo install cargo-deny --version $(CARGO_DENY_VERSION) --locked --no-default-features --root $(CACHE)/tools --target-dir $(CACHE)/tools/target
	@rm -rf $(CACHE)/tools/target

$(CARGO_AUDITABLE):
	$(call say,building cargo-auditable $(CARGO_AUDITABLE_VERSION) - under a minute)
	@cargo install cargo-auditable --version $(CARGO_AUDITABLE_VERSION) --locked --root $(CACHE)/tools --target-dir $(CACHE)/tools/target
	@rm -rf $(CACHE)/tools/target

clean: ## Remove what was built, control plane binaries included.
	rm -rf $(CACHE)
