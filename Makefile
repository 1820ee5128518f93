# The targets that Watermill's adapters have, and those of this repository's own. What a test needs of a server it starts
# by itself (CONTRIBUTING.md); with `make up` it can have yours: REDIS_ADDR=127.0.0.1:6379 make test

REDIS_IMAGE ?= redis:8.6
REDIS_PORT  ?= 6379
CONTAINER   ?= goxstreams-redis

# Further flags of go test, such as -run TestFault
TESTFLAGS  ?=
FUZZTIME   ?= 5s
SEED       ?= 1
SEEDS      ?= 1000
FOR        ?= 2m
DEPLOYMENT ?= single
VERSION    ?= v0.99.0
EXAMPLES   ?= $(patsubst _examples/%/go.mod,%,$(shell git ls-files '_examples/*/go.mod'))
MODULES    ?= $(patsubst %/go.mod,%,$(shell git ls-files '*/go.mod'))

# One place says which version.
STATICCHECK   ?= go run $(shell sed -n 's/^readonly STATICCHECK=//p' .ci/run)
GOVULNCHECK   ?= golang.org/x/vuln/cmd/govulncheck@v1.9.0
GOLANGCI_LINT ?= go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

CLI = $(if $(findstring valkey,$(REDIS_IMAGE)),valkey-cli,redis-cli)

.PHONY: up wait down build test test_v test_short test_race test_stress test_reconnect test_acl \
	fmt tidy check lint vulnerabilities fuzz modules examples screenshots bench sim chaos ci release_dry update_watermill

up:
	docker run -d --rm --name $(CONTAINER) -p 127.0.0.1:$(REDIS_PORT):6379 $(REDIS_IMAGE)

wait:
	timeout 30 sh -c 'until docker exec $(CONTAINER) $(CLI) ping 2>&1 | grep -q PONG; do sleep 0.2; done'

down:
	docker stop $(CONTAINER)

build:
	go build ./...

test:
	go test -timeout 10m $(TESTFLAGS) ./...

test_v:
	go test -timeout 10m -v $(TESTFLAGS) ./...

test_short:
	go test -timeout 10m -short $(TESTFLAGS) ./...

test_race:
	go test -timeout 10m -race $(TESTFLAGS) ./...

# The universal suite ten times at once.
test_stress:
	GOXSTREAMS_TEST_STRESS=1 go test -timeout 30m -run '^TestPubSubStress$$' .

# With servers that restart.
test_reconnect:
	go test -timeout 10m -run 'Reconnect|Restart' .

# As a user with the rights that docs/rights.md names, and no others.
test_acl:
	GOXSTREAMS_TEST_ACL=1 go test -timeout 10m $(TESTFLAGS) .

fmt:
	git ls-files -z '*.go' | xargs -0 gofmt -l -w

tidy:
	.ci/tidy

check:
	@test -z "$$(git ls-files -z '*.go' | xargs -0 gofmt -l | tee /dev/stderr)"
	go vet ./...
	$(STATICCHECK) ./...
	.ci/tidy -diff .

# What users fetch. It asks Go's database of vulnerabilities, and so needs a network.
vulnerabilities:
	set -e; for m in . $(filter-out %/browsertest,$(filter goxstreamstest plugin/% cmd/%,$(MODULES))); do echo "== $$m"; go run -C $$m $(GOVULNCHECK) ./...; done

# What .ci/run has as "release". VERSION is one that is never released, so that all is changed that a release changes.
release_dry:
	.ci/release $(VERSION) --dry-run

lint:
	$(GOLANGCI_LINT) run ./...

fuzz:
	set -e; for f in $$(go test -list '^Fuzz' . | grep '^Fuzz'); do \
		go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x -timeout 10m .; done

# Each module within this repository, or some: make modules MODULES=internal/interop
modules:
	set -e; for m in $(MODULES); do echo "== $$m"; .ci/tidy -diff $$m; (cd $$m && go vet ./... && $(STATICCHECK) ./... && \
		go build -o /dev/null ./... && go test -race -timeout 5m ./...); done

examples:
	set -e; for e in $(EXAMPLES); do echo "== $$e"; timeout 60 go -C _examples/$$e run .; done

# Those of docs/operations-page.md, with Debian's package chromium.
screenshots:
	go -C plugin/goxui/internal/browsertest test -count=1 -run TestScreenshots . -screenshots "$(CURDIR)/docs/images"

# A quick look. benchmarks/README.md has the whole.
bench:
	go -C benchmarks run . -rounds 1 -size 0.1

sim:
	go -C internal/sim test -count=1 -timeout 0 -run TestSeeds . -seeds $(SEEDS)

chaos:
	go -C internal/chaos run . -seed $(SEED) -for $(FOR) -deployment $(DEPLOYMENT)

# The whole CI, on a bare Debian machine: root, git, Go, Docker.
ci:
	.ci/run

update_watermill:
	go get -u github.com/ThreeDotsLabs/watermill
	.ci/tidy
