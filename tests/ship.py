"""Pack a finished run into what `make look` starts from: a run whose commands 04 and 05 go on, in megabytes.

    python tests/ship.py runs/demo results/demo

Kept: instructions and labels, each policy's last adapter and its judge's in bfloat16, their metrics and
rollouts, all figures and pictures. Left out: other adapters, saved states, logs, and all answers of models
but those in evaluation/scored.jsonl, so that `make look` asks anew. Other files in the target stay there.
"""

import shutil
import sys
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
annotate, evaluate = import_module("01_annotate"), import_module("04_evaluate")

LIMIT = 16_000_000  # bytes of all adapters together
OF_A_RUN = ("annotations/config.json", "annotations/instructions.jsonl", "annotations/labels.json*")
OF_A_RUN += ("evaluation/*.json", "evaluation/scored.jsonl", "attacks/*.json*", "*/*.png")
OF_A_JUDGE = ("judge.json", "config.json", "metrics.jsonl", "reward.png")
OF_A_POLICY = ("policy.json", "config.json", "metrics.jsonl", "reward.png", "rollouts.jsonl")


def ship(run: Path, target: Path) -> None:
    """Copy the finished `run` to `target`, whose five folders are replaced."""
    annotate.require(run / "evaluation" / "scored.jsonl", f"04_evaluate.py gold --run {run}")
    judges, policies = evaluate.all_judges(run), evaluate.trained_policies(run)
    files, adapters = [path for pattern in OF_A_RUN for path in sorted(run.glob(pattern))], set()
    for name, policy in policies.items():
        files += [run / "policies" / name / file for file in OF_A_POLICY]
        adapters.add(policy["checkpoints"][max(policy["checkpoints"])])
        if policy["judge"] in judges:  # a control has none
            files += [run / "judges" / policy["judge"] / file for file in OF_A_JUDGE]
            adapters.add(judges[policy["judge"]]["adapter"])
    for part in ("annotations", "judges", "policies", "evaluation", "attacks"):
        shutil.rmtree(target / part, ignore_errors=True)
    for path in filter(Path.exists, [*files, *(adapter / "adapter_config.json" for adapter in adapters)]):
        copy = target / path.relative_to(run)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    size = 0
    for adapter in sorted(adapters):
        weights = load_file(adapter / "adapter_model.safetensors").items()
        copy = target / adapter.relative_to(run) / "adapter_model.safetensors"
        save_file({name: weight.to(torch.bfloat16) for name, weight in weights}, copy, {"format": "pt"})
        size += copy.stat().st_size
        print(f"{copy}: {copy.stat().st_size:,} bytes")
    if size > LIMIT:
        annotate.fail(f"the adapters have {size:,} bytes together, more than {LIMIT:,}")


if __name__ == "__main__":
    ship(*map(Path, sys.argv[1:]))
