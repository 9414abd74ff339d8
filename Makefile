# The command list. `make` shows it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 18

demo: ## Everything from nothing: cluster, NATS, chart, a WorkerPool at work (CLUSTER=current: on your own cluster)
	@tests/demo/demo.sh

cluster-up: ## A real Kubernetes node on this machine
	@tests/cluster/up.sh

cluster-down: ## Takes it down and leaves nothing behind
	@tests/cluster/down.sh

kubeconfig: ## Prints the path of its kubeconfig: export KUBECONFIG=$(make -s kubeconfig)
	@tests/cluster/kubeconfig.sh

image: ## The image as an OCI archive: target/image/beamline.tar
	@tests/image.sh beamline release

programs: ## The image's programs only, for `docker build .`
	@tests/image.sh programs release

crds: ## Writes crds/workerpools.yaml and the chart's copy from the Rust types
	@UPDATE=1 cargo test --quiet -p beamline-crds

check: ## Format, lints, shell scripts
	@tests/run.sh check

test: ## Every test: lints, units, a short fuzzing, the worker on a real NATS and under faults, the operator under faults, both and the chart on a real Kubernetes, the demo
	@tests/run.sh check unit fuzz worker faults operator cluster demo

test-worker: ## The worker's suites on a real NATS
	@tests/run.sh worker

test-cluster: ## The operator's and the chart's suites on a real Kubernetes
	@tests/run.sh cluster

test-faults: ## Workers and the broker killed under load, and workers killed between any two steps: two minutes
	@tests/run.sh faults

test-operator: ## The operator killed around its writes, with an API server in trouble, at rest: a minute or two
	@tests/run.sh operator

test-keda: ## The operator with the real KEDA: from zero to many and back. KEDA is built first, some minutes
	@tests/run.sh keda

test-cert-manager: ## The operator with the real cert-manager, which makes its certificate. It is built first, some minutes
	@tests/run.sh cert-manager

fuzz: ## Random input for all that judges what comes from outside: TIME seconds (60) for each target, SEED
	@TIME=$${TIME:-60} SEED=$${SEED:-0} tests/run.sh fuzz

campaign-kill: ## The same at length, with pauses and partitions: N assignments (2000000), SEED
	@tests/run.sh campaign-kill

campaign-crash: ## Every kind of work meets every fault between any two of its steps: SEED
	@tests/run.sh campaign-crash

campaign-rollout: ## Workers replaced under load: N generations (20), SEED
	@tests/run.sh campaign-rollout

campaign-scale-in: ## Workers taken away under load by the operator, N (200) of them: nothing is cut or done twice
	@tests/run.sh campaign-scale-in

campaign-flips: ## /scale written N times (300), once a second: the operator follows or ignores it and writes nothing else
	@tests/run.sh campaign-flips

campaign-budgets: ## Budgets of tenants in virtual time, under every fault: SEEDS (100000) from SEED
	@tests/run.sh campaign-budgets

campaign-operator: ## The operator killed around every write, two minutes of trouble, five of rest
	@tests/run.sh campaign-operator

bench-operator: ## The operator's figures with N pools (200) on fake nodes: time from cold, memory
	@tests/run.sh bench-operator

bench: ## Figures of the worker beside their targets: gate, memory, and no-ops beside the bare limit
	@tests/run.sh bench bench-scale-sim

bench-tenants: ## What tenants are promised, beside its targets: budgets under kills, neighbours, order, cost. SEED; five minutes
	@tests/run.sh bench-tenants

bench-scale: ## On a real Kubernetes: from work that comes to workers that do it, N times (50), beside an autoscaler and, KEDA times (0), KEDA: seven minutes
	@tests/run.sh bench-scale

bench-scale-sim: ## How many workers the operator decides for, beside an oracle, in virtual time: HOURS (1000), SEED
	@tests/run.sh bench-scale-sim

.PHONY: help demo cluster-up cluster-down kubeconfig image programs crds check test test-worker test-cluster test-faults test-operator test-keda test-cert-manager fuzz campaign-kill campaign-crash campaign-rollout campaign-scale-in campaign-flips campaign-budgets campaign-operator bench bench-tenants bench-operator bench-scale bench-scale-sim
