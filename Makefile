# `make check` is what CI runs; `make gpu`, `make gpu-tune`, `make gpu-scale` and `make gpu-train` are for a GPU.
PYTHON ?= python
JOBS ?= 2
COMPILE = $(PYTHON) -m fastgpt_kernels.compile_report --gate --jobs $(JOBS)
# the older of the two that the kernels are compiled with; the other is the installed one
OLDER_TRITON = 3.6.0
WITH_OLDER_TRITON = folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(PYTHON) -m pip install --quiet --no-deps --target "$$folder/triton" triton==$(OLDER_TRITON) && \
	PYTHONPATH="$$folder/triton" $(COMPILE)

.PHONY: check lint test slow gpu compile-gate kernels-compiled gpu-tune gpu-scale gpu-train

check: lint test compile-gate

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	lint-imports
	clang-format --dry-run -Werror kernels/fastgpt_kernels/native/src/*

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m 'slow and not gpu' --hypothesis-profile exploring

gpu:
	$(PYTHON) -m benchmarks.gpu

compile-gate:
	$(COMPILE)
	$(WITH_OLDER_TRITON) --no-float32-attention

kernels-compiled:
	$(WITH_OLDER_TRITON) --json "$$folder/rows.json" && \
	$(COMPILE) --markdown docs/kernels-compiled.md --beside "$$folder/rows.json"

gpu-tune:
	$(PYTHON) -m fastgpt_kernels.tune --seconds 420 $(if $(OUT),--out "$(OUT)")

gpu-scale:
	$(PYTHON) -m benchmarks.gpu --scaling

# GPT-2 124M on novels, for 150 seconds ours and for 150 plain PyTorch, then further seeds of it as the time allows
DATA ?= ../shared/data
gpu-train:
	$(PYTHON) -m fastgpt bench curves configs/gpt2-124m.yaml --each 150 --seconds 430 $(if $(OUT),--out "$(OUT)") \
		data.path="$(DATA)/lm/novels" data.tokenizer="$(DATA)/tokenizers/gpt2" data.validation_fraction=0.02 \
		train.steps=1500 train.batch_tokens=65536 train.warmup_steps=100 train.eval_tokens=262144 \
		train.sample_tokens=200 train.sample_prompt="It was " $(SETTINGS)
