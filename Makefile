# Both commands start from nothing: they make their own virtual environment and install the tested versions.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
THREADS ?= $(shell nproc)
export OMP_NUM_THREADS := $(THREADS)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo distill ladd students dpo dpo-iterated grpo test check benchmark clean

# torch first, so that nothing else chooses a build of it. On Linux pip's default build brings CUDA; to take another,
# say where its wheels are: make demo TORCH_ARGS='--index-url <index of CPU wheels>'
TORCH_ARGS ?=
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_ARGS) torch==2.13.0
	$(1)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(2)]'
	touch $(1)/installed
endef

.venv/installed: pyproject.toml constraints.txt
	$(call install,.venv,demo)

.venv-test/installed: pyproject.toml constraints.txt
	$(call install,.venv-test,test)

# Real SFT of the embedded base on a curated set of handwriting, then a report of held-out prompts before and after.
demo: .venv/installed
	rm -rf runs/demo
	.venv/bin/prx-post tiny data --output_dir runs/demo/data
	.venv/bin/prx-post sft --config configs/tiny/sft.yaml
	.venv/bin/prx-post eval --config configs/tiny/eval.yaml
	@echo "open runs/demo/eval/report.html"

# After the demo: its SFT checkpoint to 8, 4 and 2 steps without guidance, and quality against network evaluations.
distill: .venv/installed
	.venv/bin/prx-post distill --config configs/tiny/distill.yaml
	.venv/bin/prx-post distill --config configs/tiny/distill-4.yaml
	.venv/bin/prx-post distill --config configs/tiny/distill-2.yaml
	.venv/bin/prx-post distill --config configs/tiny/distill-ladd.yaml
	.venv/bin/prx-post eval --config configs/tiny/eval-distill.yaml
	@echo "open runs/demo/eval-distill/report.html"

# After the demo: its SFT checkpoint to 8 and 4 steps by regression and LADD, each at its own noise levels, with real images.
ladd: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/prx-post distill --config configs/tiny/distill-ladd-8.yaml \
		--num_processes 2 --per_device_train_batch_size 32
	OMP_NUM_THREADS=1 .venv/bin/prx-post distill --config configs/tiny/distill-ladd-4.yaml \
		--num_processes 2 --per_device_train_batch_size 32
	.venv/bin/prx-post eval --config configs/tiny/eval-ladd.yaml
	@echo "open runs/demo/eval-ladd/report.html"

# After the demo: students of 8, 4 and 2 steps, the first and the last aligned at their own steps, and what that gained.
students: .venv/installed
	for config in distill-renoise-8 distill-renoise-4 distill-ladd-2; do \
		OMP_NUM_THREADS=1 .venv/bin/prx-post distill --config configs/tiny/$$config.yaml \
			--num_processes 2 --per_device_train_batch_size 32 || exit 1; \
	done
	OMP_NUM_THREADS=1 .venv/bin/prx-post dpo --config configs/tiny/dpo-student-8.yaml --num_processes 2
	OMP_NUM_THREADS=1 .venv/bin/prx-post grpo --config configs/tiny/grpo-student-2.yaml --num_processes 2
	.venv/bin/prx-post eval --config configs/tiny/eval-students.yaml
	@echo "open runs/demo/eval-students/report.html"

# After the demo: pairs of its SFT checkpoint's own images, ranked by OCR; DPO on them; and what it gained.
dpo: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/prx-post data make-pairs --config configs/tiny/make-pairs.yaml --num_processes $(THREADS)
	.venv/bin/prx-post dpo --config configs/tiny/dpo.yaml
	.venv/bin/prx-post eval --config configs/tiny/eval-dpo.yaml
	@echo "open runs/demo/eval-dpo/report.html"

# After the demo: two rounds of DPO, in each of which the policy makes its own pairs.
dpo-iterated: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/prx-post dpo --config configs/tiny/dpo-iterated.yaml \
		--num_processes 2 --per_device_train_batch_size 16
	.venv/bin/prx-post eval --config configs/tiny/eval-dpo-iterated.yaml
	@echo "open runs/demo/eval-dpo-iterated/report.html"

# After the demo: its SFT checkpoint learns, from its own images, to need no guidance; and what it gained.
grpo: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/prx-post grpo --config configs/tiny/grpo.yaml --num_processes 2
	.venv/bin/prx-post eval --config configs/tiny/eval-grpo.yaml
	@echo "open runs/demo/grpo/report.html and runs/demo/eval-grpo/report.html"

test: .venv-test/installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n $(THREADS) --dist loadfile --no-loadscope-reorder

benchmark: .venv-test/installed
	.venv-test/bin/python benchmarks/sft_throughput.py

clean:
	rm -rf .venv .venv-test runs
