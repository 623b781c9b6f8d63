"""How long one optimiser step takes on the laptop: SFT of both judges, and GRPO of a policy.

    OMP_NUM_THREADS=1 python tests/bench_steps.py [--root FOLDER]

`--root`: another checkout of this repository. Compare two only where their runs alternate.
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

Pair = tuple[list[int], list[int]]


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


def main(root: Path = Path(__file__).resolve().parents[1], steps: int = 4, seed: int = 0) -> None:
    sys.path.insert(0, str(root))
    annotate, sft = import_module("01_annotate"), import_module("02_train_judge")
    tokenizer, rng = annotate.load_tokenizer(annotate.LAPTOP_MODEL), random.Random(seed)
    texts = [annotate.TEMPLATE.format(topic=t, word=w) for t in annotate.TOPICS for w in annotate.WORDS]

    def judged(text: str, reasoning: bool) -> Pair:
        output = annotate.make_candidate(text, rng)
        label, thinking = annotate.oracle(text, output)
        prompt = sft.judge_prompt(tokenizer, annotate.judge_messages(text, output), reasoning)
        return prompt, sft.judge_answer(tokenizer, label, thinking if reasoning else None)

    def sampled(text: str, group: int = 6) -> list[Pair]:
        """The rollouts of an instruction: candidates of 01 stand for them."""
        prompt = annotate.policy_prompt(tokenizer, text)
        return [
            (prompt, annotate.encode(tokenizer, annotate.make_candidate(text, rng))) for _ in range(group)
        ]

    model = sft.load_model(annotate.LAPTOP_MODEL, None, 16, sft.modules_of("laptop"))
    for name, reasoning in (("SFT, 8 reasoning examples", True), ("SFT, 8 direct examples", False)):
        batches = [[judged(t, reasoning) for t in sorted(rng.sample(texts, 8))] for _ in range(steps + 1)]
        print(f"{name}: {median_step(sft, model, batches, 1024):.1f} s", flush=True)
    batches = [[p for t in rng.sample(texts, 4) for p in sampled(t)] for _ in range(steps + 1)]
    print(f"GRPO, 24 rollouts of a policy: {median_step(sft, model, batches, 512):.1f} s")


if __name__ == "__main__":
    typer.run(main)
