"""Stage 3: GRPO, written out. One loop, two rewards.

    judge    a reasoning judge learns to hit the gold label           reward: eq. 1
    policy   a policy learns to please a judge that is now frozen     reward: its expected score

What goes in:   RUN/annotations/, and RUN/judges/NAME-sft/ from stage 2
What comes out: RUN/judges/NAME-rl/ (judge) or RUN/policies/NAME/ (policy), each with
                checkpoints/step-000010/ …   PEFT adapters
                metrics.jsonl                one record a step
                rollouts.jsonl               outputs with their rewards, some of each step

A step, as in nearly every RL of language models today:
 1. sample      G rollouts for each of P prompts from the vLLM server, with their log-probabilities
 2. reward      each rollout, as soon as it is there
 3. advantage   (r - mean) / std within the group of G; no value network
 4. update      minibatches of whole groups: eq. 2, AdamW on the LoRA weights
 5. publish     the adapter to the server under a new name; base weights never move

Simpler than the paper, and why:
 1. LoRA, at 100 times the learning rate and more: publishing is a file of some megabytes.
 2. The old log-probabilities of eq. 2 are the sampler's own: they belong to the distribution that
    the rollouts really came from, and cost no forward pass. The gap to the trainer is recorded.
 3. A rollout cut off at its length limit is judged and trained on like any other.
 4. One training process; the servers may use several GPUs.

    python 03_rl.py judge  --preset laptop --run runs/demo --judge reasoning
    python 03_rl.py policy --preset laptop --run runs/demo --judge direct
    python 03_rl.py policy --preset laptop --run runs/demo --judge reasoning
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import typer
from tqdm import tqdm

annotate = import_module("01_annotate")
sft = import_module("02_train_judge")

if TYPE_CHECKING:
    import torch

# ---------------------------------------------------------------------------------------------
# The maths: reward, advantage, loss.
# ---------------------------------------------------------------------------------------------


def verifiable_reward(score: int | None, gold: int) -> float:
    """Eq. 1: -1 for an ill-formed judgement, else (M - (score - gold)^2) / M with M = (9 - 0)^2."""
    return -1.0 if score is None else (81 - (score - gold) ** 2) / 81


def read_score(text: str, reasoning: bool) -> int | None:
    """The digit of a whole judgement as a judge writes it, None if it is ill-formed.

    The digit stands right after the first `</think>` and an empty line, and ends the answer.
    """
    if reasoning:
        _, closed, text = text.partition(annotate.THINK_CLOSE)
        if not closed or not text.startswith(annotate.AFTER_THINKING):
            return None
        text = text.removeprefix(annotate.AFTER_THINKING)
    return int(text) if re.fullmatch("[0-9]", text) else None


def group_advantages(rewards_G: Sequence[float | None], floor: float) -> list[float]:
    """(r - mean) / max(std, floor) over the rewarded rollouts of one group; 0 for one without reward.

    std is that of the population. Expected scores hardly ever tie, so without the floor a group
    whose rewards differ by a hair would be trained on as hard as any other: judge noise.
    """
    known = [r for r in rewards_G if r is not None]
    if not known:
        return [0.0] * len(rewards_G)
    mean, spread = fmean(known), max(pstdev(known), floor)
    return [0.0 if r is None or spread == 0 else (r - mean) / spread for r in rewards_G]


def grpo_loss(
    logprobs_A: torch.Tensor,
    old_A: torch.Tensor,
    advantages_A: torch.Tensor,
    weights_A: torch.Tensor,
    clip: tuple[float, float],
    beta: float = 0.0,
    reference_A: torch.Tensor | None = None,
) -> torch.Tensor:
    """Minus eq. 2, the part of the A answer tokens given; a scalar to be summed over all parts.

    `weights_A` is 1 / (|y| N) for a token of a rollout of |y| tokens, N being the rollouts of the
    whole optimiser step: so the mean over tokens, then over rollouts, comes out right whatever
    part of the step is handed in at a time. The KL term is the estimator of the GRPO paper,
    exp(ref - new) - (ref - new) - 1.
    """
    ratio = (logprobs_A - old_A).exp()
    low, high = clip
    surrogate = (ratio * advantages_A).minimum(ratio.clamp(1 - low, 1 + high) * advantages_A)
    if beta:
        assert reference_A is not None
        difference = reference_A - logprobs_A
        surrogate = surrogate - beta * (difference.exp() - difference - 1)
    return -(weights_A * surrogate).sum()


# ---------------------------------------------------------------------------------------------
# Sample and reward.
# ---------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One completion of one prompt. `reward` is None where the judgement was unusable."""

    row: dict[str, Any]
    prompt: list[int]
    tokens_T: list[int]
    logprobs_T: list[float]
    text: str
    finished: bool
    reward: float | None
    notes: dict[str, Any]
    advantage: float = 0.0


Reward = Callable[[dict[str, Any], Any], tuple[float | None, dict[str, Any]]]


@dataclass
class Task:
    """What the loop is asked to maximise: it knows nothing else of judges and policies."""

    rows: Sequence[dict[str, Any]]
    prompt: Callable[[dict[str, Any]], list[int]]
    reward: Reward  # (row, sample) -> reward, what to note down
    start: Path | None  # adapter to begin with


def prompts_of_step(rows: Sequence[dict[str, Any]], step: int, prompts: int, seed: int) -> list[dict[str, Any]]:
    """The rows of `step`: a new seeded order in every pass over the data, a function of the step alone."""
    chosen = []
    for index in range(step * prompts, (step + 1) * prompts):
        epoch, place = divmod(index, len(rows))
        order = random.Random(f"{seed} {epoch}").sample(range(len(rows)), len(rows))
        chosen.append(rows[order[place]])
    return chosen


def collect(
    endpoint: Any, adapter: str, task: Task, rows_P: Sequence[dict[str, Any]], options: dict[str, Any]
) -> tuple[list[list[Rollout]], dict[str, float]]:
    """P groups of G rewarded rollouts, and the seconds that sampling and the rest of judging took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(options["threads"]) as pool:

        def sample_group(row: dict[str, Any]) -> list[tuple[Any, Future[Any]]]:
            samples = endpoint.sample(
                task.prompt(row), n=options["group"], model=adapter,
                temperature=options["temperature"], max_tokens=options["max_tokens"],
            )  # fmt: skip
            return [(sample, pool.submit(task.reward, row, sample)) for sample in samples]

        sampled = list(pool.map(sample_group, rows_P))
        seconds = {"sample_seconds": time.perf_counter() - began}
        groups = []
        for row, group in zip(rows_P, sampled):
            prompt = task.prompt(row)
            rewards = [future.result() for _, future in group]
            groups.append([
                Rollout(row, prompt, s.tokens_T, s.logprobs_T, s.text, s.finished, reward, notes)
                for (s, _), (reward, notes) in zip(group, rewards)
            ])  # fmt: skip
    seconds["judge_seconds"] = time.perf_counter() - began - seconds["sample_seconds"]
    return groups, seconds


# ---------------------------------------------------------------------------------------------
# Update.
# ---------------------------------------------------------------------------------------------


def update(model: Any, optimizer: Any, groups: Sequence[Sequence[Rollout]], options: dict[str, Any]) -> dict[str, float]:
    """One optimiser step of eq. 2 on `groups`; statistics over its tokens.

    Rollouts without reward do not count. Rollouts with advantage 0 count in the mean, but without
    a KL term they have no gradient and are not run.
    """
    import torch

    rewarded = [r for group in groups for r in group if r.reward is not None]
    rollouts = [r for r in rewarded if r.advantage or options["beta"]]
    stats = {"tokens": 0.0, "clipped_low": 0.0, "clipped_high": 0.0, "gap": 0.0, "gap_max": 0.0, "kl": 0.0}
    device = next(model.parameters()).device

    def per_token(members: Sequence[Rollout], value: Callable[[Rollout], Sequence[float]]) -> torch.Tensor:
        return torch.tensor([x for r in members for x in value(r)], dtype=torch.float32, device=device)

    for packed in sft.pack([(r.prompt, r.tokens_T) for r in rollouts], options["tokens_per_pass"]):
        members = [rollouts[i] for i in dict.fromkeys(packed.owners_A)]
        old_A = per_token(members, lambda r: r.logprobs_T)
        advantages_A = per_token(members, lambda r: [r.advantage] * len(r.tokens_T))
        weights_A = per_token(members, lambda r: [1 / (len(r.tokens_T) * len(rewarded))] * len(r.tokens_T))
        reference_A = None
        if options["beta"]:
            with torch.no_grad(), model.disable_adapter():
                reference_A = sft.answer_logprobs(model, packed, options["temperature"])
        logprobs_A = sft.answer_logprobs(model, packed, options["temperature"])
        clip = (options["clip_low"], options["clip_high"])
        grpo_loss(logprobs_A, old_A, advantages_A, weights_A, clip, options["beta"], reference_A).backward()

        with torch.no_grad():
            ratio = (logprobs_A - old_A).exp()
            stats["tokens"] += len(old_A)
            stats["clipped_low"] += ((ratio < 1 - clip[0]) & (advantages_A < 0)).sum().item()
            stats["clipped_high"] += ((ratio > 1 + clip[1]) & (advantages_A > 0)).sum().item()
            stats["gap"] += (logprobs_A - old_A).abs().sum().item()
            stats["gap_max"] = max(stats["gap_max"], (logprobs_A - old_A).abs().max().item())
            if reference_A is not None:
                stats["kl"] += ((reference_A - logprobs_A).exp() - (reference_A - logprobs_A) - 1).sum().item()
    norm = torch.nn.utils.clip_grad_norm_(sft.trainable(model), 1.0).item() if rollouts else 0.0
    if not math.isfinite(norm):
        raise FloatingPointError("the gradient is not finite; lower --lr")
    if rollouts:
        optimizer.step()
        optimizer.zero_grad()
    share = {key: stats[key] / max(1, stats["tokens"]) for key in ("clipped_low", "clipped_high", "gap", "kl")}
    return {**stats, **share, "grad_norm": norm}


def publish(endpoint: Any, model: Any, folder: Path, step: int, old: str | None) -> str:
    """Serve the adapter as it is after `step` steps under a name of its own; retire the name `old`.

    Never the same name twice: the server would go on with the old weights, or with the old
    weights' prefix cache, without a word.
    """
    name = f"step-{step:06d}"
    model.save_pretrained(folder / "served" / name)
    endpoint.load_adapter(name, folder / "served" / name)
    if old:
        endpoint.unload_adapter(old)
        shutil.rmtree(folder / "served" / old)
    return name


# ---------------------------------------------------------------------------------------------
# The loop.
# ---------------------------------------------------------------------------------------------


def grpo(options: dict[str, Any], folder: Path, endpoint: Any, task: Task) -> None:
    """Train for `options["steps"]` steps; goes on from the newest saved state in `folder`."""
    first, state = sft.latest_state(folder)
    model = sft.load_model(
        options["model"], state or task.start, options["lora_rank"], options["lora_modules"], options["seed"]
    )
    optimizer = sft.make_optimizer(model, options["lr"])
    if state:
        sft.restore_optimizer(optimizer, model, state)
        print(f"going on after step {first} of {options['steps']}")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        sft.rewind_metrics(folder / name, first)
    shutil.rmtree(folder / "served", ignore_errors=True)
    served = publish(endpoint, model, folder, first, None)

    bar = tqdm(range(first, options["steps"]), initial=first, total=options["steps"], desc=folder.name)
    for step in bar:
        rows_P = prompts_of_step(task.rows, step, options["prompts"], options["seed"])
        groups, seconds = collect(endpoint, served, task, rows_P, options)
        for group in groups:
            for rollout, advantage in zip(group, group_advantages([r.reward for r in group], options["std_floor"])):
                rollout.advantage = advantage

        began = time.perf_counter()
        size = math.ceil(len(groups) / options["minibatches"])
        updates = [update(model, optimizer, groups[i : i + size], options) for i in range(0, len(groups), size)]
        seconds["train_seconds"] = time.perf_counter() - began
        if updates[0]["gap"] > 0.5:
            annotate.fail(
                f"{folder}: before any update of step {step} the trainer's log-probabilities differ from the sampler's "
                f"by {updates[0]['gap']:.2f} per token on average: the server does not serve the adapter trained here."
            )
        if step == 0 and not any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n):
            print("note: the adapter has not moved in the first step (every group was flat)")

        began = time.perf_counter()
        served = publish(endpoint, model, folder, step + 1, served)
        seconds["publish_seconds"] = time.perf_counter() - began
        metrics = {"step": step, **measure(groups, options), **merge(updates), **seconds, "lr": options["lr"]}
        annotate.append_jsonl(folder / "metrics.jsonl", metrics)
        save_rollouts(folder / "rollouts.jsonl", step, groups, options)
        bar.set_postfix({key: metrics[key] and round(metrics[key], 2) for key in ("reward", "length", "invalid")})
        if (step + 1) % options["show_every"] == 0:
            show(groups, step)
        last = step + 1 == options["steps"]
        if (step + 1) % options["checkpoint_every"] == 0 or last:
            model.save_pretrained(folder / "checkpoints" / f"step-{step + 1:06d}")
        if (step + 1) % options["save_every"] == 0 or last:
            sft.save_state(folder, step + 1, model, optimizer)
    endpoint.unload_adapter(served)
    shutil.rmtree(folder / "served")


def measure(groups: Sequence[Sequence[Rollout]], options: dict[str, Any]) -> dict[str, Any]:
    """What the batch says of the policy that sampled it."""
    everyone = [r for group in groups for r in group]
    rewards = [r.reward for r in everyone if r.reward is not None]
    spreads = [pstdev([r.reward for r in group if r.reward is not None] or [0.0]) for group in groups]
    return {
        "prompt_ids": [group[0].row["id"] for group in groups],
        "reward": fmean(rewards) if rewards else None,
        "reward_std": fmean(spreads),
        "flat_groups": fmean(spread < max(options["std_floor"], 1e-9) for spread in spreads),
        "length": fmean(len(r.tokens_T) for r in everyone),
        "truncated": fmean(not r.finished for r in everyone),
        "invalid": fmean(r.notes.get("invalid", False) for r in everyone),
        "rollouts": len(everyone),
    }


def merge(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Statistics of a step: the gap before its first update, where both should agree; means of the rest."""
    return {
        "gap": updates[0]["gap"],
        "gap_max": updates[0]["gap_max"],
        "train_tokens": sum(u["tokens"] for u in updates),
        **{key: fmean(u[key] for u in updates) for key in ("clipped_low", "clipped_high", "kl", "grad_norm")},
    }


def save_rollouts(path: Path, step: int, groups: Sequence[Sequence[Rollout]], options: dict[str, Any]) -> None:
    """Keep the first `save_rollouts` rollouts of the step."""
    everyone = [r for group in groups for r in group][: options["save_rollouts"]]
    for number, r in enumerate(everyone):
        row = {key: r.row[key] for key in ("instruction", "output") if key in r.row}
        annotate.append_jsonl(path, {
            "id": f"{step}-{number}", "step": step, **row, "completion": r.text, "finished": r.finished,
            "reward": r.reward, "advantage": round(r.advantage, 4), **r.notes,
        })  # fmt: skip


def show(groups: Sequence[Sequence[Rollout]], step: int) -> None:
    """Print the best and the worst rollout of the first group: look at them, not only at the curve."""
    group = sorted((r for r in groups[0] if r.reward is not None), key=lambda r: r.reward or 0)
    for name, r in (("worst", group[0]), ("best", group[-1])) if group else ():
        tqdm.write(f"  step {step}, {name} of a group, reward {r.reward:.2f}: {' '.join(r.text.split())[:160]}")


# ---------------------------------------------------------------------------------------------
# The two tasks.
# ---------------------------------------------------------------------------------------------


def judge_task(options: dict[str, Any], run: Path, tokenizer: Any, judge: dict[str, Any], start: Path) -> Task:
    """A judge against gold labels: eq. 1."""
    rows = sft.labelled(run, "judge_train")
    reasoning = judge["reasoning"]

    def prompt(row: dict[str, Any]) -> list[int]:
        return annotate.judge_prompt(tokenizer, row["instruction"], row["output"], reasoning)

    def reward(row: dict[str, Any], sample: Any) -> tuple[float, dict[str, Any]]:
        score = read_score(sample.text, reasoning) if sample.finished else None
        return verifiable_reward(score, row["label"]), {"label": score, "gold": row["label"], "invalid": score is None}

    return Task([r for r in rows if len(prompt(r)) <= judge["max_prompt"]], prompt, reward, start)


def policy_task(options: dict[str, Any], run: Path, tokenizer: Any, judge: Any) -> Task:
    """A policy against a frozen judge: the expected score."""
    rows = annotate.read_jsonl(run / "annotations" / "instructions.jsonl", ["id", "split", "instruction"])

    def prompt(row: dict[str, Any]) -> list[int]:
        return annotate.policy_prompt(tokenizer, row["instruction"])

    def reward(row: dict[str, Any], sample: Any) -> tuple[float | None, dict[str, Any]]:
        verdict = annotate.ask_judge(judge, row["instruction"], sample.text.strip())
        return verdict.expected, {"label": verdict.label, "thinking": verdict.thinking, "invalid": verdict.label is None}

    chosen = [r for r in rows if r["split"] == "policy_train" and len(prompt(r)) <= options["max_prompt"]]
    return Task(chosen, prompt, reward, None)


def find_judge(run: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """(folder, judge.json) of the judge `name`; 'reasoning' means reasoning-rl if begun, else -sft.

    A judge whose RL was begun and not finished is refused: which of the two is meant?
    """
    folder = run / "judges" / name
    if not folder.exists() and not name.endswith(("-sft", "-rl")):
        folder = run / "judges" / f"{name}-rl"
        if not folder.exists():
            folder = run / "judges" / f"{name}-sft"
        elif not (folder / "judge.json").exists():
            annotate.fail(f"{folder} is not finished: finish it (03_rl.py judge --run {run}) or ask for --judge {name}-sft.")
    flag = "--no-reasoning" if "direct" in name else "--reasoning"
    annotate.need(folder / "judge.json", f"02_train_judge.py --run {run} {flag}")
    return folder, json.loads((folder / "judge.json").read_text())


@contextlib.contextmanager
def serve_policy_and_judge(options: dict[str, Any], judge: dict[str, Any], folder: Path, run: Path) -> Iterator[tuple[Any, Any]]:
    """Endpoints of policy and judge: one server with two adapters where they share the base model."""
    share = {"gpus": options["gpus"], "memory": options["gpu_memory"]}
    judge_len = judge["max_prompt"] + judge["max_thinking"] + 16
    policy_len = options["max_prompt"] + options["max_tokens"]
    modules = sorted({*options["lora_modules"], *judge["lora_modules"]})
    with contextlib.ExitStack() as stack:
        if judge["model"] == options["model"]:
            rank = max(options["lora_rank"], judge["lora_rank"])
            policy = stack.enter_context(annotate.serve(
                options["model"], run / "logs", max_len=max(policy_len, judge_len), lora_rank=rank, max_loras=3, lora_modules=modules, **share,
            ))  # fmt: skip
            ours = policy
        else:
            share["memory"] /= 2
            policy = stack.enter_context(annotate.serve(
                options["model"], run / "logs", max_len=policy_len, lora_rank=options["lora_rank"], max_loras=2, lora_modules=options["lora_modules"], **share,
            ))  # fmt: skip
            ours = stack.enter_context(annotate.serve(
                judge["model"], run / "logs", max_len=judge_len, lora_rank=judge["lora_rank"], lora_modules=judge["lora_modules"], **share,
            ))  # fmt: skip
        ours.load_adapter("judge", folder / judge["adapter"])
        yield policy, sft.open_judge(ours, annotate.load_tokenizer(judge["model"]), "judge", judge)


# ---------------------------------------------------------------------------------------------
# The commands.
# ---------------------------------------------------------------------------------------------

SHARED = {
    "group": (6, 8, 8),
    "std_floor": (0.1, 0.1, 0.1),
    "clip_low": (0.2, 0.2, 0.2),
    "clip_high": (0.3, 0.3, 0.3),
    "save_every": (1, 10, 10),
    "show_every": (5, 10, 10),
    "threads": (64, 256, 1024),
    "gpus": ("0", "0", "0,1,2,3,4,5,6"),
    "gpu_memory": (0.5, 0.5, 0.9),
    "train_gpu": (0, 0, 7),
    "seed": (0, 0, 0),
}
JUDGE = {
    **SHARED,
    "steps": (4, 100, 150),
    "prompts": (4, 64, 256),
    "minibatches": (2, 4, 4),
    "lr": (3e-5, 2e-5, 2e-5),
    "temperature": (1.0, 1.0, 1.0),
    "max_tokens": (96, 4096, 4096),
    "tokens_per_pass": (512, 16_384, 16_384),
    "checkpoint_every": (1000, 50, 50),
    "save_rollouts": (24, 16, 16),
}
POLICY = {
    **SHARED,
    "model": (annotate.LAPTOP_MODEL, "Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    "lora_rank": (16, 32, 64),
    "lora_modules": (sft.ATTENTION, sft.LINEAR, sft.LINEAR),
    "steps": (16, 300, 1200),
    "prompts": (4, 32, 128),
    "minibatches": (2, 4, 4),
    "lr": (1e-3, 2e-5, 2e-5),
    "beta": (0.0, 0.0, 0.0),
    "temperature": (0.7, 0.7, 0.7),
    "max_prompt": (256, 2048, 2048),
    "max_tokens": (32, 2048, 2048),
    "tokens_per_pass": (512, 16_384, 16_384),
    "checkpoint_every": (4, 50, 100),
    "save_rollouts": (24, 32, 32),
}
HELP = {
    "group": "G, rollouts of one prompt. Paper: 8.",
    "std_floor": "Least standard deviation by which advantages are divided, in units of reward. Paper: silent.",
    "clip_low": "eps_low of eq. 2. Paper: 0.2.",
    "clip_high": "eps_high of eq. 2. Paper: 0.3.",
    "save_every": "Steps between two saved states: what a killed run loses at most.",
    "show_every": "Steps between two printed pairs of rollouts.",
    "threads": "Requests in flight at once.",
    "gpus": "GPUs of the servers, one replica on each.",
    "gpu_memory": "Share of the memory of these GPUs that the servers take.",
    "train_gpu": "The GPU that trains.",
    "seed": "Seed of the adapter and of the order of prompts.",
    "steps": "Steps, each of --minibatches optimiser steps. Paper: 100-200 (judge), up to 1200 (policy).",
    "prompts": "P, prompts of one step; P x G rollouts. Paper: a batch of 2048 (judge), 1024 (policy), silent of what; we read: rollouts.",
    "minibatches": "Optimiser steps made of one batch. Paper: 4.",
    "lr": "Learning rate, constant. Paper: 1e-6, full fine-tuning.",
    "beta": "Weight of the KL term. The reference is the base model, the adapter switched off. Paper: 0.",
    "temperature": "Sampling temperature. Paper: 1.0 (judge), 0.7 (policy).",
    "max_prompt": "Longest prompt, in tokens; longer ones are left out. Paper: 2048.",
    "max_tokens": "Longest rollout, in tokens. Paper: 4096 (judge), 2048 (policy).",
    "tokens_per_pass": "Tokens of one forward pass: memory, not the result, depends on it.",
    "checkpoint_every": "Steps between two kept adapters.",
    "save_rollouts": "Rollouts of each step written to rollouts.jsonl.",
    "model": "The policy's base model. Paper: Llama-3.1-8B-Instruct and two more.",
    "lora_rank": "Rank of the adapter: 1, 8, 16, 32, 64, 128, 256 (as vLLM serves).",
    "lora_modules": "Linear layers that get an adapter.",
}


def judge_option(name: str) -> Any:
    return annotate.option(JUDGE, name, HELP[name])


def policy_option(name: str) -> Any:
    return annotate.option(POLICY, name, HELP[name])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0])


@app.command("judge")
def train_judge(
    run: Path = annotate.RUN,
    preset: annotate.Preset | None = annotate.PRESET,  # type: ignore[name-defined]
    judge: str = typer.Option("reasoning", help="The judge of stage 2 to go on with: reasoning or direct."),
    steps: int | None = judge_option("steps"),
    prompts: int | None = judge_option("prompts"),
    group: int | None = judge_option("group"),
    minibatches: int | None = judge_option("minibatches"),
    lr: float | None = judge_option("lr"),
    std_floor: float | None = judge_option("std_floor"),
    clip_low: float | None = judge_option("clip_low"),
    clip_high: float | None = judge_option("clip_high"),
    temperature: float | None = judge_option("temperature"),
    max_tokens: int | None = judge_option("max_tokens"),
    tokens_per_pass: int | None = judge_option("tokens_per_pass"),
    checkpoint_every: int | None = judge_option("checkpoint_every"),
    save_every: int | None = judge_option("save_every"),
    save_rollouts: int | None = judge_option("save_rollouts"),
    show_every: int | None = judge_option("show_every"),
    threads: int | None = judge_option("threads"),
    gpus: str | None = judge_option("gpus"),
    gpu_memory: float | None = judge_option("gpu_memory"),
    train_gpu: int | None = judge_option("train_gpu"),
    seed: int | None = judge_option("seed"),
) -> None:
    """Train a judge on gold labels (eq. 1)."""
    options = annotate.settle(JUDGE, run, preset, dict(locals()))
    start, sft_judge = find_judge(run, f"{judge.removesuffix('-sft')}-sft")
    folder = start.with_name(start.name.replace("-sft", "-rl"))
    kept = {key: sft_judge[key] for key in ("model", "lora_rank", "lora_modules")}
    options |= {**kept, "beta": 0.0, "judge": start.name}
    annotate.record_config(folder, options)
    if not (folder / "judge.json").exists():
        use_gpu(options)
        tokenizer = annotate.load_tokenizer(options["model"])
        task = judge_task(options, run, tokenizer, sft_judge, start / sft_judge["adapter"])
        with annotate.serve(
            options["model"], run / "logs", max_len=sft_judge["max_prompt"] + options["max_tokens"], max_loras=2,
            lora_rank=kept["lora_rank"], lora_modules=kept["lora_modules"], gpus=options["gpus"], memory=options["gpu_memory"],
        ) as endpoint:  # fmt: skip
            grpo(options, folder, endpoint, task)
        adapter = f"checkpoints/step-{options['steps']:06d}"
        annotate.write_json(folder / "judge.json", {**sft_judge, "adapter": adapter, "steps": options["steps"]})
    report(folder)


@app.command("policy")
def train_policy(
    run: Path = annotate.RUN,
    preset: annotate.Preset | None = annotate.PRESET,  # type: ignore[name-defined]
    judge: str = typer.Option(..., help="The judge to please: direct or reasoning (its RL-trained form, if there is one), or a folder's name in RUN/judges."),
    model: str | None = policy_option("model"),
    lora_rank: int | None = policy_option("lora_rank"),
    lora_modules: list[str] | None = policy_option("lora_modules"),
    steps: int | None = policy_option("steps"),
    prompts: int | None = policy_option("prompts"),
    group: int | None = policy_option("group"),
    minibatches: int | None = policy_option("minibatches"),
    lr: float | None = policy_option("lr"),
    beta: float | None = policy_option("beta"),
    std_floor: float | None = policy_option("std_floor"),
    clip_low: float | None = policy_option("clip_low"),
    clip_high: float | None = policy_option("clip_high"),
    temperature: float | None = policy_option("temperature"),
    max_prompt: int | None = policy_option("max_prompt"),
    max_tokens: int | None = policy_option("max_tokens"),
    tokens_per_pass: int | None = policy_option("tokens_per_pass"),
    checkpoint_every: int | None = policy_option("checkpoint_every"),
    save_every: int | None = policy_option("save_every"),
    save_rollouts: int | None = policy_option("save_rollouts"),
    show_every: int | None = policy_option("show_every"),
    threads: int | None = policy_option("threads"),
    gpus: str | None = policy_option("gpus"),
    gpu_memory: float | None = policy_option("gpu_memory"),
    train_gpu: int | None = policy_option("train_gpu"),
    seed: int | None = policy_option("seed"),
) -> None:  # fmt: skip
    """Train a policy against a judge (its expected score)."""
    options = annotate.settle(POLICY, run, preset, {**locals(), "lora_modules": lora_modules or None})
    judge_folder, trained = find_judge(run, judge)
    options["judge"] = judge_folder.name
    print(f"judge: {judge_folder}")
    folder = run / "policies" / judge
    annotate.record_config(folder, options)
    if not (folder / "policy.json").exists():
        use_gpu(options)
        tokenizer = annotate.load_tokenizer(options["model"])
        with serve_policy_and_judge(options, trained, judge_folder, run) as (endpoint, ours):
            grpo(options, folder, endpoint, policy_task(options, run, tokenizer, ours))
        annotate.write_json(folder / "policy.json", {key: options[key] for key in options if key in POLICY or key == "judge"})
    report(folder)


def use_gpu(options: dict[str, Any]) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(options["train_gpu"])


def report(folder: Path) -> None:
    """Print how the reward went: means over the first and the last fifth of the steps."""
    records = annotate.read_jsonl(folder / "metrics.jsonl", ["step", "reward"])
    part = max(1, len(records) // 5)
    first, last = records[:part], records[-part:]

    def mean(rows: list[dict[str, Any]], key: str) -> str:
        known = [row[key] for row in rows if row[key] is not None]
        return f"{fmean(known):.2f}" if known else "none"

    changes = (f"{key} {mean(first, key)} -> {mean(last, key)}" for key in ("reward", "invalid", "length", "truncated"))
    print(f"{folder}: {len(records)} steps; first and last {part}: {', '.join(changes)}")


if __name__ == "__main__":
    app()
