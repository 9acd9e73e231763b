# Everything on a fresh machine with Python and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
RUNS := runs/digits

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Without this setting, `accelerate launch` gives a process one CPU thread. Waiting threads must not spin.
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
export OMP_WAIT_POLICY ?= PASSIVE

LAUNCH := accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: install demo test test-slow bench lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "tessella needs Python 3.11 or newer; set PYTHON="'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: export HF_HUB_OFFLINE = 1
demo: $(RUNS)/pipeline/model_index.json
	python -m pipelines.evaluate configs/digits/evaluate.yaml
	@printf '\n%s\n' 'Done. In $(RUNS): samples.png, reconstructions.png, metrics.json, and the model in pipeline/.'
	@printf '%s\n' 'Use it from Python ($(VENV)/bin/python):' \
		'    from pipelines import VQGANPipeline' \
		'    pipe = VQGANPipeline.from_pretrained("$(CURDIR)/$(RUNS)/pipeline")' \
		'    pipe.generate(class_labels=[3, 7]).images[0].show()'

# Each step of the demo writes a file when it has finished. An interrupted step continues where it stopped.
# Batches of the prior are so small that a second CPU thread slows it.
$(RUNS)/vqgan/train_results.json: configs/digits/stage1.yaml | install
	$(LAUNCH) -m stage1_vqgan.train configs/digits/stage1.yaml
	@touch $@

$(RUNS)/codes/manifest.json: configs/digits/stage2.yaml $(RUNS)/vqgan/train_results.json | install
	$(LAUNCH) -m stage2_prior.tokenize configs/digits/stage2.yaml
	@touch $@

$(RUNS)/prior/train_results.json: configs/digits/stage2.yaml $(RUNS)/codes/manifest.json | install
	OMP_NUM_THREADS=1 $(LAUNCH) -m stage2_prior.train configs/digits/stage2.yaml
	@touch $@

$(RUNS)/pipeline/model_index.json: $(RUNS)/vqgan/train_results.json $(RUNS)/prior/train_results.json | install
	python -m pipelines.build --tokenizer $(RUNS)/vqgan --prior $(RUNS)/prior --output_dir $(RUNS)/pipeline \
		--sampling_defaults "{guidance_scale: 2.0, guidance_schedule: linear, min_p: 0.01}"

# Two workers share the test files; a second CPU thread in each would only slow the other. The many processes that the
# tests start need the byte code.
test: export OMP_NUM_THREADS = 1
test: export PYTHONDONTWRITEBYTECODE =
test: export HF_HUB_OFFLINE = 1
test: install
	python -m pytest -n 2 --dist loadfile

test-slow: export HF_HUB_OFFLINE = 1
test-slow: install
	python -m pytest -m slow

bench: export HF_HUB_OFFLINE = 1
bench: install
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	python -m benchmarks.run --suite cpu

lint: install
	ruff check .
	ruff format --check .
	mypy

format: install
	ruff check --fix .
	ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
