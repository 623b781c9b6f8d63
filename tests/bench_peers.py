"""Our GRPO step beside TRL's GRPOTrainer, and 01's labelling beside the bare vLLM engine.

    python3 -m venv venv-trl && venv-trl/bin/pip install --no-deps trl==1.16.0
    realpath .venv/lib/python3.*/site-packages > $(echo venv-trl/lib/python3.*/site-packages)/ours.pth
    .venv/bin/python tests/bench_peers.py --trl venv-trl/bin/python --json OUT.json prompts=4 tokens=64

The .pth file lets TRL's environment see our torch and transformers. Each side runs in a process of its own;
model, dtype, LoRA, prompts, group, optimiser steps of a batch and clip are the same, outputs have one length,
rewards are free. TRL samples with transformers, its only way on a CPU; train_ratio leaves it out. Ratios are
theirs / ours, of medians after a first step; memory_ratio is of the training process's peak above what it
held with its model loaded; label_ratio is our tokens a second / the engine's.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
annotate, sft = import_module("01_annotate"), import_module("02_train_judge")
GPU, PER_PASS = torch.cuda.is_available(), 6  # PER_PASS: rollouts of one forward pass of TRL's, at most
SETTINGS: dict[str, Any] = {"preset": "laptop", "model": annotate.LAPTOP_MODEL, "prompts": 4, "group": 6}
SETTINGS |= {"tokens": 64, "minibatches": 2, "steps": 5, "bf16": int(GPU), "requests": 128, "seqs": 64}


def megabytes(peak: bool) -> float:
    """What this process has held at most since the last call, or holds now; on a GPU, what is allocated."""
    status = Path("/proc/self/status").read_text().split("VmHWM:" if peak else "VmRSS:")[1]
    held = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats() if GPU else Path("/proc/self/clear_refs").write_text("5")
    return held / 2**20 if GPU else int(status.split()[0]) / 1024


def texts(s: Any) -> list[str]:
    every = [annotate.TEMPLATE.format(topic=t, word=w) for t in annotate.TOPICS for w in annotate.WORDS]
    return random.Random(0).sample(every, s["prompts"] * (s["steps"] + 1))


def reward(text: str) -> float:
    return random.Random(text).uniform(0, 9)


def ours(s: Any, run: Path) -> Any:
    """The command `03_rl.py policy --judge truth`, with `reward` in place of truth."""
    rl, loaded, load, sample = import_module("03_rl"), [], sft.load_training, annotate.Endpoint.sample

    def load_training(*arguments: Any) -> Any:
        model, optimizer = load(*arguments)
        loaded.extend([megabytes(peak=False), str(model.get_base_model().dtype)[6:]])
        return model, optimizer

    sft.load_training, annotate.truth = load_training, lambda text, output: reward(output)
    annotate.Endpoint.sample = lambda *a, **more: sample(*a, **more, ignore_eos=True)
    options = {"preset": s["preset"], "gold": "oracle", "gold_effort": "none", "gold_url": ""}
    annotate.write_json(run / "annotations/config.json", {"options": options})
    rows = [{"id": text, "split": "policy_train", "instruction": text} for text in texts(s)]
    annotate.write_jsonl(run / "annotations/instructions.jsonl", rows)
    line = f"policy --run {run} --judge truth --lr 1e-4 --lora-rank 16 --max-prompt 512 --std-floor 0"
    line += f" --steps {s['steps'] + 1} --max-tokens {s['tokens']}"
    line += "".join(f" --{key} {s[key]}" for key in ("model", "prompts", "group", "minibatches"))
    rl.app(line.split(), standalone_mode=False)
    records = annotate.read_jsonl(run / "policies/truth/metrics.jsonl")[1:]
    assert all(r["length"] == s["tokens"] and not r["zero_variance_groups"] for r in records)
    step, train = zip(*((r["seconds"], r["seconds"] - r["collect_seconds"]) for r in records))
    memory, dtype = megabytes(peak=True) - loaded[0], loaded[1]
    return {"step": median(step), "train": median(train), "memory": memory, "dtype": dtype}


def trl(s: Any, folder: Path) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    begins, sampling, n, size = [], [], s["minibatches"], s["prompts"] * s["group"] // s["minibatches"]
    passes = next(k for k in range(1, size + 1) if size % k == 0 and size // k <= PER_PASS)

    class Timed(GRPOTrainer):  # a step lasts from one sampling to the next
        def _generate(self, *arguments: Any, **more: Any) -> Any:
            begins.append(time.perf_counter())
            made = super()._generate(*arguments, **more)
            sampling.append(time.perf_counter() - begins[-1])
            return made

    config = GRPOConfig(
        str(folder), max_steps=n * (s["steps"] + 1), per_device_train_batch_size=size // passes, beta=0.0,
        gradient_accumulation_steps=passes, steps_per_generation=n * passes, num_generations=s["group"],
        loss_type="grpo", epsilon=0.2, epsilon_high=0.3, learning_rate=1e-4, lr_scheduler_type="constant",
        max_completion_length=s["tokens"], generation_kwargs={"min_new_tokens": s["tokens"]}, temperature=0.7,
        gradient_checkpointing=GPU, bf16=bool(s["bf16"]), model_init_kwargs={"dtype": s["dtype"]},
        use_cpu=not GPU, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = Timed(
        s["model"], lambda completions, **_: [reward(c[0]["content"]) for c in completions], config,
        Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts(s)]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=sft.modules_of(s["preset"])),
    )  # fmt: skip
    before = megabytes(peak=False)
    trainer.train()
    ends = [*begins[1:], time.perf_counter()]
    step = [end - begin for begin, end in zip(begins, ends, strict=True)][1:]
    train = [whole - part for whole, part in zip(step, sampling[1:], strict=True)]
    return {"step": median(step), "train": median(train), "memory": megabytes(peak=True) - before}


def label(s: Any, folder: Path) -> Any:
    """01's way to a label: threads, a chat request each, JSONL."""
    gold, ask_server = {"gold_effort": "none", "gold_tokens": s["tokens"]}, annotate.Endpoint.ask

    def fixed_length(self: Any, prompt: Any, request: Any, read: Any) -> Any:
        def read_a_digit(choices: Any) -> Any:
            choices[0] |= {"finish_reason": "stop", "message": {"content": "7"}}
            return read(choices)

        return ask_server(self, prompt, {**request, "ignore_eos": True}, read_a_digit)

    annotate.Endpoint.ask = fixed_length
    with annotate.serve(s["model"], folder, 2048, flags=f"--max-num-seqs {s['seqs']}") as endpoint:
        ask = partial(annotate.grade, gold, endpoint, "Write.")
        label_all = partial(annotate.map_to_jsonl, work=ask, title="labels", threads=2 * s["seqs"])
        return rate(s, lambda tasks: label_all(folder / min(tasks), tasks))


def engine(s: Any, _: Path) -> Any:
    """The same chats, all at once, in vLLM's offline engine with the settings of `serve`."""
    os.environ |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams

    cpu = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "distributed_executor_backend": "uni"}
    more: Any = {} if GPU else cpu
    llm = LLM(s["model"], max_model_len=2048, max_num_seqs=s["seqs"], generation_config="vllm", **more)
    params = SamplingParams(temperature=0, max_tokens=s["tokens"], ignore_eos=True)
    ask = partial(annotate.judge_messages, "Write.")
    return rate(s, lambda tasks: llm.chat([*map(ask, tasks.values())], params, use_tqdm=False))


def rate(s: Any, work: Any) -> Any:
    """Tokens a second of `work` on outputs that are new each time; the first time warms up."""
    rng, rates = random.Random(0), []
    for n in range(s["steps"] + 1):
        tasks = {f"{n}-{i:04}": " ".join(rng.choices(annotate.TOPICS, k=40)) for i in range(s["requests"])}
        began = time.perf_counter()
        work(tasks)
        rates.append(s["requests"] * s["tokens"] / (time.perf_counter() - began))
    return {"rate": median(rates[1:])}


def main(
    changes: list[str] | None = typer.Argument(None, help="KEY=VALUE of SETTINGS."),
    out: Path | None = typer.Option(None, "--json", help="Write all figures to this file."),
    trl_python: str = typer.Option(sys.executable, "--trl", help="The Python that has TRL."),
) -> None:
    given = dict(change.split("=", 1) for change in changes or [])
    s = SETTINGS | {key: type(SETTINGS[key])(value) for key, value in given.items()}
    found: dict[str, Any] = {"settings": s}
    for side in ("ours", "trl", "label", "engine"):
        python = trl_python if side == "trl" else sys.executable
        text = subprocess.check_output([python, __file__, side, json.dumps(s)], text=True).splitlines()[-1]
        print(side, text, flush=True)
        found[side] = json.loads(text)
        s["dtype"] = found["ours"]["dtype"]  # TRL takes that of ours
    found |= {f"{key}_ratio": found["trl"][key] / found["ours"][key] for key in ("step", "train", "memory")}
    found["label_ratio"] = found["label"]["rate"] / found["engine"]["rate"]
    print({key: round(value, 2) for key, value in found.items() if key.endswith("_ratio")})
    if out:
        annotate.write_json(out, found)


if __name__ == "__main__" and sys.argv[1:2] and sys.argv[1] in ("ours", "trl", "label", "engine"):
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(globals()[sys.argv[1]](json.loads(sys.argv[2]), Path(scratch))), flush=True)
elif __name__ == "__main__":
    typer.run(main)
