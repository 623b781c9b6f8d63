"""How long one optimiser step takes on the laptop: SFT of both judges, and GRPO of a policy.

    OMP_NUM_THREADS=1 python tests/bench_steps.py [--root FOLDER]

`--root`: another checkout of this repository, timed on the same tokens. Compare where runs alternate.
"""

import random
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import typer

HERE = Path(__file__).resolve().parents[1]
Pair = tuple[list[int], list[int]]
LORA = {"lora_rank": 16, "seed": 0, "lr": 1e-4, "checkpointing": False}


def make_batches(steps: int, seed: int) -> dict[str, tuple[int, list[list[Pair]]]]:
    """name -> (tokens of a forward pass, the (prompt, answer) pairs of each step), as the demo has them."""
    annotate, sft = import_module("01_annotate"), import_module("02_train_judge")
    tokenizer, rng = annotate.load_tokenizer(annotate.LAPTOP_MODEL), random.Random(seed)
    texts = [annotate.TEMPLATE.format(topic=t, word=w) for t in annotate.TOPICS for w in annotate.WORDS]

    def judged(text: str, reasoning: bool) -> Pair:
        output = annotate.make_candidate(text, rng)
        label, thinking = annotate.oracle(text, output)
        prompt = sft.judge_prompt(tokenizer, annotate.judge_messages(text, output), reasoning)
        return prompt, sft.judge_answer(tokenizer, label, thinking if reasoning else None)

    def sampled(text: str) -> list[Pair]:
        """Six rollouts: candidates of 01 stand for them."""
        outputs = [annotate.make_candidate(text, rng) for _ in range(6)]
        return [(annotate.policy_prompt(tokenizer, text), annotate.encode(tokenizer, o)) for o in outputs]

    def examples(reasoning: bool) -> list[list[Pair]]:
        return [[judged(text, reasoning) for text in sorted(rng.sample(texts, 8))] for _ in range(steps)]

    return {
        "SFT, 8 reasoning examples": (1024, examples(True)),
        "SFT, 8 direct examples": (1024, examples(False)),
        "GRPO, 24 rollouts": (
            512,
            [[p for t in rng.sample(texts, 4) for p in sampled(t)] for _ in range(steps)],
        ),
    }


def median_step(sft: Any, model: Any, batches: Sequence[Sequence[Pair]], budget: int) -> float:
    """Median seconds of a step on each of `batches`, after the first; `budget`: tokens of a forward pass."""
    optimizer, seconds = torch.optim.AdamW(sft.trainable(model), lr=1e-4), []
    for pairs in batches:
        began = time.perf_counter()
        for packed in sft.pack(pairs, budget):
            (-sft.answer_logprobs(model, packed).mean()).backward()
        torch.nn.utils.clip_grad_norm_(sft.trainable(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main(root: Path = HERE, steps: int = 5, seed: int = 0) -> None:
    sys.path.insert(0, str(HERE))
    batches, model = make_batches(steps, seed), import_module("01_annotate").LAPTOP_MODEL
    modules = import_module("02_train_judge").modules_of("laptop")
    for name in ("01_annotate", "02_train_judge"):
        del sys.modules[name]
    sys.path.insert(0, str(root))
    sft = import_module("02_train_judge")
    policy, _ = sft.load_training({**LORA, "model": model, "lora_modules": modules}, None)
    for name, (budget, some) in batches.items():
        print(f"{name}: {median_step(sft, policy, some, budget):.1f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
