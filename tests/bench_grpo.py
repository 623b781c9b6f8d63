"""Our GRPO step against TRL's GRPOTrainer: python tests/bench_grpo.py --json OUT.json

Needs TRL (pip install trl==1.16.0), which nothing else here does. Both sides run in processes of
their own, one after the other, on the same machine: same model, LoRA, prompts, group size, number of
optimiser steps a batch, a reward that costs nothing, and completions of one fixed length (the stop
token is ignored). A step is one batch: sample, reward, all of its optimiser steps, and making the new
weights known to the sampler. The first step is dropped; medians of the rest are compared.

TRL samples here with transformers, which is its only sampler that runs on a CPU: its vLLM modes need
CUDA. On a GPU its vLLM server mode would be the better peer.

Ratios are theirs / ours: step_ratio (whole step), train_ratio (all but sampling and reward),
memory_ratio (the training process's peak above what it holds once the model is loaded).

    python tests/bench_grpo.py --train-only --shape 8b     our training part alone, on a GPU: token/s and MFU
    python tests/bench_grpo.py --growth                    how a step's cost grows (picture)
"""

import itertools
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parent.parent))
annotate = import_module("01_annotate")
sft = import_module("02_train_judge")
rl = import_module("03_rl")
evaluate = import_module("04_evaluate")


def resident(peak: bool = False) -> float:
    """This process's memory in MB, now or at its peak since `forget_peak` (Linux)."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def reward(text: str) -> float:
    """Different for different texts, so that no group is flat, and free."""
    return random.Random(text).uniform(0, 9)


def instructions(count: int) -> list[str]:
    return random.Random(0).sample(annotate.template_instructions(), count)


# ---------------------------------------------------------------------------------------------
# The two sides. Each prints one line of JSON: medians over the steps but the first.
# ---------------------------------------------------------------------------------------------


def run_ours(o: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, annotate.serve(
        o["model"], Path(folder), max_len=256 + o["tokens"], lora_rank=16, max_loras=2, lora_modules=sft.ATTENTION
    ) as endpoint:  # fmt: skip
        return our_steps(endpoint, o)


def our_steps(endpoint: Any, o: dict[str, Any]) -> dict[str, Any]:
    base = 0.0
    load = sft.load_model

    def measured(*arguments: Any) -> Any:
        nonlocal base
        model = load(*arguments)
        forget_peak()
        base = resident()
        return model

    options = {
        "model": o["model"], "lora_rank": 16, "lora_modules": sft.ATTENTION, "seed": 0, "lr": 1e-4, "steps": o["steps"] + 1,
        "prompts": o["prompts"], "group": o["group"], "minibatches": o["minibatches"], "threads": 1024, "temperature": 0.7,
        "max_tokens": o["tokens"], "tokens_per_pass": o["tokens_per_pass"], "clip_low": 0.2, "clip_high": 0.3, "beta": 0.0,
        "std_floor": 0.0, "save_rollouts": 0, "show_every": 10**9, "checkpoint_every": 10**9, "save_every": 10**9, "overlap": o["overlap"],
    }  # fmt: skip
    rows = [{"id": str(n), "instruction": text} for n, text in enumerate(instructions(o["prompts"] * (o["steps"] + 1)))]
    tokenizer = annotate.load_tokenizer(o["model"])

    class Fixed(annotate.Endpoint):  # type: ignore[misc, name-defined]
        def sample(self, prompt: list[int], **more: Any) -> Any:
            return super().sample(prompt, extra={"ignore_eos": True}, **more)

    task = rl.Task(rows, lambda row: annotate.policy_prompt(tokenizer, row["instruction"]), rl.one_by_one(lambda row, s: (reward(s.text), {})), None)
    sft.load_model = measured
    try:
        with tempfile.TemporaryDirectory() as folder:
            rl.grpo(options, Path(folder), Fixed(endpoint.url, endpoint.key, endpoint.model), task, f"step-{secrets.token_hex(3)}")
            metrics = annotate.read_jsonl(Path(folder) / "metrics.jsonl")[1:]
    finally:
        sft.load_model = load
    assert all(m["length"] == o["tokens"] and m["flat_groups"] == 0 for m in metrics)
    return {
        "step": statistics.median(m["seconds"] for m in metrics),
        "sample": statistics.median(m["sample_seconds"] + m["judge_seconds"] for m in metrics),
        "train": statistics.median(m["seconds"] - m["sample_seconds"] - m["judge_seconds"] for m in metrics),
        "publish": statistics.median(m["publish_seconds"] for m in metrics),
        "memory": resident(peak=True) - base, "loaded": base, "steps": len(metrics),
    }  # fmt: skip


def run_trl(o: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks: list[tuple[str, float]] = []  # what ended, and when

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            forget_peak()
            marks.append(("begin", time.perf_counter()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(("update", time.perf_counter()))

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate(self, *arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            result = super()._generate(*arguments, **more)
            marks.append(("sampling", time.perf_counter() - began))
            return result

    size = o["prompts"] * o["group"]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=o["minibatches"] * (o["steps"] + 1), num_generations=o["group"],
        per_device_train_batch_size=size // o["minibatches"] // o["accumulate"], gradient_accumulation_steps=o["accumulate"],
        steps_per_generation=o["minibatches"] * o["accumulate"], num_iterations=1,
        max_completion_length=o["tokens"], generation_kwargs={"min_new_tokens": o["tokens"]}, temperature=0.7, top_k=0, top_p=1.0,
        learning_rate=1e-4, lr_scheduler_type="constant", beta=0.0, epsilon=0.2, epsilon_high=0.3, loss_type="grpo", scale_rewards="group",
        gradient_checkpointing=False, bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float32"} if not torch.cuda.is_available() else None,
    )  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in instructions(o["prompts"] * (o["steps"] + 1))]
    trainer = Timed(
        model=o["model"], args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
        reward_funcs=lambda completions, **_: [reward(c[0]["content"]) for c in completions],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=list(sft.ATTENTION)),
    )  # fmt: skip
    base = resident()
    trainer.train()
    updates = [when for what, when in marks if what in ("begin", "update")][:: o["minibatches"]]
    steps = [end - start for start, end in itertools.pairwise(updates)][1:]
    sampling = [seconds for what, seconds in marks if what == "sampling"][1:]
    assert len(steps) == len(sampling) == o["steps"], (len(steps), len(sampling))
    return {
        "step": statistics.median(steps), "sample": statistics.median(sampling),
        "train": statistics.median(a - b for a, b in zip(steps, sampling)), "memory": resident(peak=True) - base, "loaded": base, "steps": len(steps),
    }  # fmt: skip


def side(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a process of its own; its last line is its result."""
    command = [sys.executable, __file__, "--side", name, "--options", json.dumps(options)]
    with tempfile.TemporaryFile("w+") as errors:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        errors.seek(0)
        if result.returncode:
            sys.exit(f"{name} failed:\n{errors.read()[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------
# The training part alone, any shape, with random weights.
# ---------------------------------------------------------------------------------------------

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1.7b": (2048, 6144, 28, 16, 8, 151936),
    "4b": (2560, 9728, 36, 32, 8, 151936),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "14b": (5120, 17408, 40, 40, 8, 151936),
}


def train_only(shape: str, o: dict[str, Any], peak_flops: float) -> dict[str, Any]:
    """Seconds, token/s, memory and model FLOP utilisation of `update` on made-up rollouts.

    Model FLOPs of a token fed: 2 N forward and 2 N backward (LoRA: no gradient of the N frozen
    weights), attention 4 L D c forward for c tokens of context and twice that backward; the
    vocabulary counts for completion tokens only. Recomputation does not count.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv, vocab = SHAPES[shape]
    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, max_position_embeddings=32768, attn_implementation="sdpa", dtype=torch.bfloat16 if gpu else torch.float32,
    )  # fmt: skip
    with torch.device("cuda" if gpu else "cpu"):
        base = LlamaForCausalLM(config).to(torch.bfloat16 if gpu else torch.float32)
    if gpu:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=64, lora_alpha=128, target_modules=list(sft.LINEAR))).train()
    optimizer = sft.make_optimizer(model, 1e-5)
    rng = random.Random(0)
    options = {"temperature": 0.7, "clip_low": 0.2, "clip_high": 0.3, "beta": 0.0, "tokens_per_pass": o["tokens_per_pass"]}

    def groups() -> list[list[Any]]:
        found = []
        for _ in range(o["prompts"]):
            prompt = [rng.randrange(vocab) for _ in range(o["prompt_tokens"])]
            samples = [annotate.Sample([rng.randrange(vocab) for _ in range(o["tokens"])], [-11.0] * o["tokens"], "", True) for _ in range(o["group"])]
            found.append([rl.Rollout({}, prompt, s, 1.0, {}, rng.choice([-1.0, 1.0])) for s in samples])
        return found

    linear = layers * (hidden * hidden * 2 + 2 * hidden * hidden * kv // heads + 3 * hidden * inner)
    fed = o["prompts"] * (o["prompt_tokens"] + o["group"] * o["tokens"])
    context = o["prompt_tokens"] + o["tokens"] / 2
    flops = fed * (4 * linear + 3 * 4 * layers * hidden * context / 2) + o["prompts"] * o["group"] * o["tokens"] * 4 * hidden * vocab
    seconds = []
    for _ in range(o["steps"] + 1):
        batch = groups()
        began = time.perf_counter()
        rl.update(model, optimizer, batch, options)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[1:])
    memory = torch.cuda.max_memory_allocated() / 2**20 if gpu else resident(peak=True)
    return {
        "shape": shape, "seconds": median, "completion_tokens_per_s": o["prompts"] * o["group"] * o["tokens"] / median,
        "mfu": flops / median / peak_flops if gpu else None, "peak_MB": memory, "tokens_per_pass": o["tokens_per_pass"],
    }  # fmt: skip


def judging(endpoint: Any, model: str, kind: str, group: int) -> dict[str, Any]:
    """Seconds and calls in which the untrained base model judges one group of outputs, as stage 3 asks it."""
    from concurrent.futures import Future, ThreadPoolExecutor

    pointwise = annotate.Judge(endpoint, annotate.load_tokenizer(model), None, reasoning=False, max_prompt=400)
    pairwise = replace(pointwise, pairwise=True)
    calls = itertools.count()

    def alone(row: dict[str, Any], sample: str) -> tuple[float | None, dict[str, Any]]:
        next(calls)
        return annotate.ask_judge(pointwise, row["instruction"], sample).expected, {}

    def wins(row: dict[str, Any], first: str, second: str) -> float | None:
        next(calls)
        verdict = annotate.ask_judge(pairwise, row["instruction"], first, second)
        return verdict.probabilities[0] if verdict.label else None

    (row,) = [{"instruction": text} for text in instructions(1)]
    samples: list[Any] = [Future() for _ in range(group)]
    for number, sample in enumerate(samples):
        sample.set_result(f"Sentence {number} of {group} is about something else, {secrets.token_hex(4)}.")
    rewards = rl.one_by_one(alone) if kind == "pointwise" else rl.against_each_other(wins, group, 4 if "4" in kind else 0, False)
    began = time.perf_counter()
    with ThreadPoolExecutor(1024) as pool:
        rewards(row, samples, pool)
    return {"judge": kind, "group": group, "calls": next(calls), "seconds": time.perf_counter() - began}


VARIED = {"prompts": [2, 4, 8, 16], "tokens": [16, 32, 64, 128], "group": [3, 6, 12, 24]}
SIZES = [4, 8, 16, 32]  # of a group that is judged alone


def growth(o: dict[str, Any]) -> list[dict[str, Any]]:
    """Step time while one of prompts, completion length and group size doubles; the others stay. Then judging alone, by group size."""
    with tempfile.TemporaryDirectory() as folder, annotate.serve(
        o["model"], Path(folder), max_len=512, lora_rank=16, max_loras=2, lora_modules=sft.ATTENTION
    ) as endpoint:  # fmt: skip
        rows = [{"varied": name, "value": value, **our_steps(endpoint, {**o, name: value})} for name, values in VARIED.items() for value in values]
        judging(endpoint, o["model"], "pointwise", 4)  # warm
        return rows + [judging(endpoint, o["model"], kind, size) for kind in ("pointwise", "pairwise, 4 opponents", "pairwise, all") for size in SIZES]


def draw_growth(rows: list[dict[str, Any]], picture: Path) -> None:
    figure, ((*axes, last),) = evaluate.panels(1, 4, (15, 3.6))
    titles = {"prompts": "prompts a step", "tokens": "tokens a rollout", "group": "rollouts a prompt"}
    for axis, (name, values) in zip(axes, VARIED.items()):
        for key, style in (("step", "o-"), ("sample", "s--"), ("train", "^:")):
            axis.plot(values, [r[key] for r in rows if r.get("varied") == name], style, label=key)
        axis.set(xlabel=titles[name], ylim=(1.5, 70))
    for kind, style in (("pointwise", "o-"), ("pairwise, 4 opponents", "s--"), ("pairwise, all", "^:")):
        last.plot(SIZES, [r["seconds"] for r in rows if r.get("judge") == kind], style, label=kind)
    last.set(xlabel="rollouts a prompt: judging one group")
    for axis, values in zip((*axes, last), (*VARIED.values(), SIZES)):
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(values, [str(value) for value in values])
        ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if axis.get_ylim()[0] < tick < axis.get_ylim()[1]]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=8)
    last.legend(fontsize=8)
    figure.savefig(picture, dpi=150)


def main(
    json_path: Path | None = typer.Option(None, "--json", help="Write the results here."),
    model: str = annotate.LAPTOP_MODEL,
    prompts: int = 4,
    group: int = 6,
    tokens: int = typer.Option(64, help="Length of every completion."),
    prompt_tokens: int = typer.Option(512, help="Length of a prompt; with --train-only."),
    minibatches: int = 2,
    accumulate: int = typer.Option(1, help="TRL's gradient accumulation: micro-batches of an optimiser step."),
    tokens_per_pass: int = typer.Option(512, help="Ours: tokens of one forward pass."),
    steps: int = typer.Option(5, help="Measured steps, after one that is dropped."),
    overlap: bool = False,
    train_only_: bool = typer.Option(False, "--train-only"),
    shape: str = "8b",
    peak_flops: float = typer.Option(989e12, help="Of the GPU in bfloat16, dense; an H100 SXM's."),
    growth_: Path | None = typer.Option(None, "--growth", help="Measure how the cost grows; draw it here."),
    side_: str = typer.Option("", "--side", hidden=True),
    options: str = typer.Option("", hidden=True),
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")
    if side_:
        print(json.dumps({"ours": run_ours, "trl": run_trl}[side_](json.loads(options))))
        return
    o = {
        "model": model, "prompts": prompts, "group": group, "tokens": tokens, "prompt_tokens": prompt_tokens, "minibatches": minibatches,
        "accumulate": accumulate, "tokens_per_pass": tokens_per_pass, "steps": steps, "overlap": overlap,
    }  # fmt: skip
    if train_only_:
        result: Any = train_only(shape, o, peak_flops)
    elif growth_:
        result = growth(o)
        draw_growth(result, growth_)
    else:
        annotate.load_tokenizer(model)
        ours, theirs = side("ours", o), side("trl", o)
        made = prompts * group * tokens
        result = {
            **{f"{name}_ratio": theirs[name] / ours[name] for name in ("step", "train", "memory")},
            "ours": {**ours, "tokens_per_s": made / ours["step"]}, "trl": {**theirs, "tokens_per_s": made / theirs["step"]}, "options": o,
        }  # fmt: skip
    print(json.dumps(result, indent=1))
    if json_path:
        annotate.write_json(json_path, result)


if __name__ == "__main__":
    typer.run(main)
