"""What fine-tuning a judge of any size costs: memory of one GPU and hours, by formula, and measured where one is at hand.

    python tests/bench_sft.py                       the table for Qwen3-4B, 8B, 14B, by formula
    python tests/bench_sft.py --measure qwen3-4b    also run a few packs of that shape (random weights) here
    python tests/bench_sft.py --measure smollm2-135m --tokens 1024     the same on a CPU: checks the memory formula

The formula counts, for T tokens in one forward pass with gradient checkpointing, b bytes a weight (2 in
bfloat16): N weights x b; P adapter weights x 16 (float32 weight, gradient, two Adam moments); the input of
every layer, L T D b; one layer recomputed, with the float32 copies that peft makes of every adapted layer's
input; one chunk of logits and its gradient in float32. Time: 6 FLOPs for each weight
of the layers and token (forward, recomputed forward, backward to the activations; frozen weights have no
gradient), 12 L D for each pair of tokens in reach, at an assumed share of the peak.
"""

import random
import resource
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
evaluate = import_module("04_evaluate")
sft = import_module("02_train_judge")

# From the models' config.json: hidden, intermediate, layers, heads, key-value heads, head width, vocabulary, tied embeddings
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "qwen3-14b": (5120, 17408, 40, 40, 8, 128, 151936, False),
}
RANK, CHUNK = 64, 2048
# Assumed tokens of one example: the judge's prompt around a Tulu instruction and output; gold's reasoning (paper: 982 at high effort).
PROMPT, REASONING = 1000, 982


def linears(shape: str) -> list[tuple[int, int]]:
    """(in, out) of the seven linear maps of a layer."""
    hidden, inner, _, heads, kv, width, _, _ = SHAPES[shape]
    return [(hidden, heads * width), (hidden, kv * width), (hidden, kv * width), (heads * width, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]


def memory(shape: str, tokens: int, weight: int = 2) -> dict[str, float]:
    """Bytes by part, for one rank; `tokens` in one pass, `weight` bytes a weight."""
    hidden, _, layers, _, _, _, vocabulary, tied = SHAPES[shape]
    maps = linears(shape)
    inputs, outputs = sum(a for a, _ in maps), sum(b for _, b in maps)
    return {
        "weights": weight * (layers * sum(a * b for a, b in maps) + vocabulary * hidden * (1 if tied else 2)),
        "adapter": 16 * layers * RANK * (inputs + outputs),
        "checkpoints": weight * layers * tokens * hidden,
        "layer": tokens * (weight * (outputs + inputs) + 4 * inputs),
        "logits": 3 * 4 * min(CHUNK, tokens) * vocabulary,
    }


def flops(shape: str, tokens: int, answer: int) -> float:
    """Of one example of `tokens`, `answer` of which go through the vocabulary."""
    hidden, _, layers, heads, _, width, vocabulary, _ = SHAPES[shape]
    weights = layers * sum(a * b for a, b in linears(shape))
    return 6 * weights * tokens + 12 * layers * heads * width * tokens * tokens / 2 + 8 * answer * hidden * vocabulary


def measure(shape: str, tokens: int, answer: int, passes: int) -> dict[str, float]:
    """Seconds and bytes of a few optimiser steps of one pack each, by the code of stage 2 on random weights."""
    import peft
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, inner, layers, heads, kv, width, vocabulary, tied = SHAPES[shape]
    gpu = torch.cuda.is_available()
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=width, tie_word_embeddings=tied, attn_implementation="sdpa", dtype=torch.bfloat16 if gpu else torch.float32,
    )  # fmt: skip
    before = 0 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.device("cuda" if gpu else "cpu"):
        base = Qwen3ForCausalLM(config).to(config.dtype)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(sft.LINEAR))).train()
    optimizer = sft.make_optimizer(model, 1e-4)
    rng, seconds = random.Random(0), []
    for _ in range(passes + 1):
        pairs = [([rng.randrange(vocabulary) for _ in range(PROMPT)], [rng.randrange(vocabulary) for _ in range(answer)]) for _ in range(max(1, tokens // (PROMPT + answer)))]
        began = time.perf_counter()
        for packed in sft.pack(pairs, 10**9):
            (-sft.answer_logprobs(model, packed, chunk=CHUNK).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / len(pairs))
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"seconds": statistics.median(seconds[1:]), "bytes": peak}


def main(
    measured: str = typer.Option("", "--measure", help=f"Run this shape: {', '.join(SHAPES)}."),
    tokens: int = typer.Option(16_384, help="Tokens of one forward pass; --preset node: 16,384."),
    peak_flops: float = typer.Option(989e12, help="Of the GPU in bfloat16, dense; an H100 SXM's."),
    share: float = typer.Option(0.4, help="Share of the peak that is assumed to be reached."),
    passes: int = typer.Option(3, help="Measured passes, after one that is dropped."),
) -> None:
    rows: list[list[Any]] = []
    for shape in SHAPES:
        parts = memory(shape, tokens)
        hours = [1000 * flops(shape, PROMPT + answer, answer) / (share * peak_flops) / 60 for answer in (2, REASONING)]
        rows.append([shape, *(f"{parts[key] / 1e9:.1f}" for key in parts), f"{sum(parts.values()) / 1e9:.0f}", *hours])
    print(f"one rank, bfloat16, LoRA rank {RANK} on all linear layers, {tokens} tokens a pass, {share:.0%} of {peak_flops / 1e12:.0f} TFLOP/s, computed")
    print(evaluate.table(["GB", *memory("qwen3-4b", 1), "all", "min/1000 direct", "min/1000 reasoning"], rows))
    if measured:
        import torch

        got = measure(measured, tokens, REASONING if tokens >= PROMPT + REASONING else 2, passes)
        formula = sum(memory(measured, min(tokens, max(1, tokens // (PROMPT + 2)) * (PROMPT + 2)), 2 if torch.cuda.is_available() else 4).values())
        print(f"{measured}, measured: {got['bytes'] / 1e9:.2f} GB (formula {formula / 1e9:.2f}), {got['seconds']:.3f} s an example")


if __name__ == "__main__":
    typer.run(main)
