"""What fine-tuning a judge of any size costs: memory of one GPU and minutes, by formula, and measured here.

    python tests/bench_sft.py                       the table for Qwen3-1.7B to 14B, by formula
    python tests/bench_sft.py --measure qwen3-4b    also a few packs of that shape (random weights), here

For T tokens in one forward pass with gradient checkpointing and b bytes a weight (2 in bfloat16): N weights
x b; P adapter weights x 16 (float32 weight, gradient, two Adam moments); the input of every layer, L T D b;
one layer recomputed, with the float32 copies that peft makes of every adapted layer's input; logits,
softmax and gradient, 12 bytes each. Time: 6 FLOPs for each weight of the layers and token (frozen weights
have no gradient), 12 L D for each pair of tokens in reach, at an assumed share of the GPU's peak.
"""

import random
import resource
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sft = import_module("02_train_judge")

# Of config.json: hidden, intermediate, layers, heads, key-value heads, head width, vocabulary, tied weights.
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "qwen3-14b": (5120, 17408, 40, 40, 8, 128, 151936, False),
}
RANK = 64
PROMPT, REASONING = 1000, 982  # assumed tokens of one example (paper: 982 of reasoning at high effort)


def linears(shape: str) -> list[tuple[int, int]]:
    """(in, out) of the seven linear maps of a layer."""
    hidden, inner, _, heads, kv, width, _, _ = SHAPES[shape]
    attention = [(hidden, heads * width), (hidden, kv * width), (hidden, kv * width), (heads * width, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def memory(shape: str, tokens: int, answers: int, weight: int = 2) -> dict[str, float]:
    """Bytes by part, for one rank: `tokens` in one pass, `answers` of them predicted."""
    hidden, _, layers, _, _, _, vocabulary, tied = SHAPES[shape]
    inputs, outputs = (sum(pair[end] for pair in linears(shape)) for end in (0, 1))
    matrices = layers * sum(a * b for a, b in linears(shape))
    return {
        "weights": weight * (matrices + vocabulary * hidden * (1 if tied else 2)),
        "adapter": 16 * layers * RANK * (inputs + outputs),
        "checkpoints": weight * layers * tokens * hidden,
        "layer": tokens * (weight * (outputs + inputs) + 4 * inputs),
        "logits": 12 * answers * vocabulary,
    }


def flops(shape: str, tokens: int, answer: int) -> float:
    """Of one example of `tokens`, `answer` of which go through the vocabulary."""
    hidden, _, layers, heads, _, width, vocabulary, _ = SHAPES[shape]
    weights = layers * sum(a * b for a, b in linears(shape))
    return 6 * weights * tokens + 6 * layers * heads * width * tokens**2 + 4 * answer * hidden * vocabulary


def measure(shape: str, tokens: int, answer: int, passes: int) -> tuple[float, float]:
    """(seconds an example, peak bytes) of optimiser steps of one pack each, by the code of stage 2."""
    import peft
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, inner, layers, heads, kv, width, vocabulary, tied = SHAPES[shape]
    gpu = torch.cuda.is_available()
    config = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "head_dim": width}
    config |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv}
    before = 0 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    with torch.device("cuda" if gpu else "cpu"):
        base = Qwen3ForCausalLM(Qwen3Config(**config, tie_word_embeddings=tied, attn_implementation="sdpa"))
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=sft.modules_of("node"))
    model = peft.get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW(sft.trainable(model), lr=1e-4)
    rng, seconds, count = random.Random(0), [], max(1, tokens // (PROMPT + answer))
    for _ in range(passes + 1):
        sizes = [(PROMPT, answer)] * count
        pairs = [tuple([rng.randrange(vocabulary) for _ in range(n)] for n in size) for size in sizes]
        began = time.perf_counter()
        for packed in sft.pack(pairs, 10**9):
            (-sft.answer_logprobs(model, packed).mean()).backward()
        sft.optimizer_step(model, optimizer, 1e-4)
        seconds.append((time.perf_counter() - began) / count)
    peak = (
        torch.cuda.max_memory_allocated()
        if gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return statistics.median(seconds[1:]), peak - before


def main(
    measured: str = typer.Option("", "--measure", help=f"Run this shape: {', '.join(SHAPES)}."),
    tokens: int = typer.Option(8192, help="Tokens of one forward pass (--tokens-per-pass)."),
    peak_flops: float = typer.Option(989e12, help="Of the GPU in bfloat16, dense; an H100 SXM's."),
    share: float = typer.Option(0.15, help="Share of the peak; an H100 reached 0.09 to 0.20."),
    passes: int = typer.Option(3, help="Measured passes, after one that is dropped."),
) -> None:
    print(
        f"computed: one rank, bfloat16, LoRA rank {RANK}, {tokens} tokens a pass, {share:.0%} of the peak; GB"
    )
    for shape in SHAPES:
        parts = memory(shape, tokens, tokens * REASONING // (PROMPT + REASONING))
        texts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        minutes = [1000 * flops(shape, PROMPT + a, a) / (share * peak_flops) / 60 for a in (2, REASONING)]
        print(f"{shape:12} {sum(parts.values()) / 1e9:5.0f}  ({texts})  minutes for 1000 examples: ", end="")
        print("direct {:.1f}, reasoning {:.1f}".format(*minutes))
    if measured:
        seconds, peak = measure(measured, tokens, REASONING if tokens >= PROMPT + REASONING else 2, passes)
        print(f"{measured}, measured: {peak / 1e9:.2f} GB, {seconds:.3f} s an example")


if __name__ == "__main__":
    typer.run(main)
