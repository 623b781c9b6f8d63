"""Stage 3: GRPO, written out. One loop, two rewards.

    judge    a judge learns to hit the gold label                     reward: eq. 1 (pairwise: eq. 3)
    policy   a policy learns to please a judge that is now frozen     reward: its expected score (eq. 4)

What goes in:   RUN/annotations/, and RUN/judges/NAME-sft/ of stage 2 (--from base: its settings only)
What comes out: RUN/judges/NAME-rl/ or RUN/policies/NAME/, with
                checkpoints/step-000004/ …   PEFT adapters
                metrics.jsonl                one record a step
                rollouts.jsonl               outputs with their rewards, some of each step

A step, as in nearly every RL of language models today:
 1. sample      G rollouts for each of P prompts from the vLLM server, with their log-probabilities
 2. reward      each rollout
 3. advantage   (r - mean) / std within the group of G; no value network
 4. update      minibatches of whole groups: eq. 2, AdamW on the LoRA weights
 5. publish     the adapter to the server under a new name; base weights never move

Simpler than the paper, and why:
 1. LoRA, at a higher learning rate: publishing is a file of some megabytes.
 2. The old log-probabilities of eq. 2 are the sampler's own: they belong to the distribution that the
    rollouts came from, and cost no forward pass. `logprob_gap` is their distance from the trainer's.
 3. A policy's rollout cut off at its length limit is judged and trained on like any other.
 4. No DDP: each rank works on its share of a step's prompts; one sum over the gradients joins them.

    python 03_rl.py judge  --preset laptop --run runs/demo --judge reasoning
    python 03_rl.py policy --preset laptop --run runs/demo --judge direct
    python 03_rl.py policy --preset laptop --run runs/demo --judge reasoning
    python 03_rl.py policy --run runs/x --judge reasoning --policy-gpus 0,1 --judge-gpus 2,3 --train-gpus 4,5

From stage 2: `pack`, `answer_logprobs`, `optimizer_step`, the saved state, `on_ranks`, and `ask_judge`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from tqdm import tqdm
from typer import Option

annotate = import_module("01_annotate")
sft = import_module("02_train_judge")
fail = annotate.fail
Row, Options = dict[str, Any], dict[str, Any]

# --- The maths: reward, advantage, loss -----------------------------------------------------------


def verifiable_reward(score: int | None, gold: int) -> float:
    """Eq. 1: -1 for an ill-formed judgement, else (M - (score - gold)^2) / M with M = (9 - 0)^2."""
    return -1.0 if score is None else (81 - (score - gold) ** 2) / 81


def pairwise_verifiable_reward(choice: int | None, gold: int) -> float:
    """Eq. 3: -1 for an ill-formed judgement, else 1 for gold's choice and 0 for the other."""
    return -1.0 if choice is None else float(choice == gold)


def read_score(text: str, reasoning: bool, labels: str = annotate.LABELS) -> int | None:
    """The digit of a whole judgement as a judge writes it, None if it is ill-formed or not one of `labels`.

    The digit stands right after the first `</think>` and an empty line, and ends the answer.
    """
    if reasoning:
        _, closed, text = text.partition(sft.THINK_CLOSE)
        if not closed or not text.startswith(sft.AFTER_THINKING):
            return None
        text = text.removeprefix(sft.AFTER_THINKING)
    return int(text) if re.fullmatch(f"[{labels}]", text) else None


def group_advantages(rewards_G: Sequence[float | None], floor: float, scale: bool = True) -> list[float]:
    """(r - mean) / max(std, floor) over the rewarded rollouts of one group; 0 for one without reward.

    std is that of the population. Expected scores hardly ever tie, so without the floor a group whose rewards
    differ by a hair would be trained on as hard as any other. `scale` False: no division (Dr. GRPO).
    """
    known = [r for r in rewards_G if r is not None]
    mean, spread = (fmean(known), max(pstdev(known), floor)) if known else (0.0, 0.0)
    spread = spread if scale else 1.0
    return [0.0 if r is None or spread == 0 else (r - mean) / spread for r in rewards_G]


def grpo_loss(
    logprobs_A: Any, old_A: Any, advantages_A: Any, weights_A: Any, clip: tuple[float, float],
    beta: float = 0.0, reference_A: Any = None,
) -> Any:  # fmt: skip
    """Minus eq. 2, the part of the A answer tokens given (all shapes [A]); a scalar, to be summed over parts.

    `weights_A` is 1 / (|y| N) for a token of a rollout of |y| tokens, N being the rollouts of the whole
    optimiser step: so the mean over tokens, then over rollouts, comes out right whatever part of the step is
    handed in at a time. The KL term is the estimator of the GRPO paper, exp(ref - new) - (ref - new) - 1.
    """
    ratio = (logprobs_A - old_A).exp()
    low, high = clip
    surrogate = (ratio * advantages_A).minimum(ratio.clamp(1 - low, 1 + high) * advantages_A)
    if beta:
        difference = reference_A - logprobs_A
        surrogate = surrogate - beta * (difference.exp() - difference - 1)
    return -(weights_A * surrogate).sum()


# --- The loop -------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One completion of one prompt. `reward` is None where the judgement was invalid."""

    row: Row
    prompt: list[int]
    sample: Any  # tokens_T, logprobs_T, text, finished: annotate.Sample
    reward: float | None
    advantage: float
    notes: Row


Rewards = tuple[list[float | None], list[Row]]  # of a group's rollouts, and what to note of each


@dataclass
class Task:
    """What the loop is asked to maximise: it knows nothing else of judges and policies.

    `rewards(row, samples_G, pool)`: the rewards of a group and notes on each; its judge is asked in `pool`.
    """

    rows: Sequence[Row]
    prompt: Callable[[Row], list[int]]
    rewards: Callable[[Row, Sequence[Any], Executor], Rewards]
    start: Path | None = None  # adapter to begin with


def grpo(options: Options, folder: Path, endpoint: Any, task: Task) -> None:
    """Train for `options["steps"]` steps, on every rank; resumes from the saved state in `folder`."""
    rank, ranks = sft.rank_and_size()
    first, state = sft.latest_state(folder)
    model, optimizer = sft.load_training(options, state, task.start)
    size = math.ceil(options["prompts"] / options["minibatches"])
    if rank == 0:
        print(f"{options['steps']} steps, {first} of them done", flush=True)
        sft.rewind(folder / "metrics.jsonl", first)
        sft.rewind(folder / "rollouts.jsonl", first)
    adapter = publish(endpoint, model, folder, first)
    for step in tqdm(range(first, options["steps"]), initial=first, total=options["steps"], disable=rank > 0):
        # 1-3. Sample, reward, advantage: this rank's groups, minibatch by minibatch.
        began = time.perf_counter()
        rows_P = prompts_of_step(task.rows, step, options["prompts"], options["seed"])
        shares = [rows_P[i : i + size][rank::ranks] for i in range(0, len(rows_P), size)]
        groups = collect(endpoint, adapter, task, [row for share in shares for row in share], options)
        collected = time.perf_counter()

        # 4. Update.
        ends = list(itertools.accumulate(map(len, shares), initial=0))
        minibatches = [groups[a:b] for a, b in itertools.pairwise(ends)]
        updates = [update(model, optimizer, m, options, n == 0) for n, m in enumerate(minibatches)]

        # 5. Publish.
        adapter = publish(endpoint, model, folder, step + 1)
        seconds = {"collect_seconds": collected - began, "seconds": time.perf_counter() - began}

        # Record.
        records = gather_records(groups, step)
        if rank == 0:
            metrics = {"step": step, **measure(records, updates, options), **seconds}
            annotate.append_jsonl(folder / "metrics.jsonl", metrics)
            for record in records[:SAVE_ROLLOUTS]:
                annotate.append_jsonl(folder / "rollouts.jsonl", record)
            if step % SHOW_EVERY == 0:
                show(records, step)
            if (step + 1) % options["checkpoint_every"] == 0 or step + 1 == options["steps"]:
                sft.save_adapter(model, folder / "checkpoints" / f"step-{step + 1:06d}")
            sft.save_state(folder, step + 1, model, optimizer)


def prompts_of_step(rows: Sequence[Row], step: int, prompts: int, seed: int) -> list[Row]:
    """The rows of `step`: a new seeded order in every pass over the data, a function of the step alone."""
    places = [divmod(index, len(rows)) for index in range(step * prompts, (step + 1) * prompts)]
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(rows, len(rows)) for epoch, _ in places}
    return [orders[epoch][place] for epoch, place in places]


def collect(endpoint: Any, adapter: str, task: Task, rows: Sequence[Row], options: Options) -> list[Any]:
    """A group of G rewarded rollouts for each of `rows`; a group is judged while others are still sampled."""

    def one_group(row: Row) -> list[Rollout]:
        prompt = task.prompt(row)
        how = {"temperature": options["temperature"], "max_tokens": options["max_tokens"]}
        samples_G = endpoint.sample(prompt, options["group"], adapter, **how)
        rewards_G, notes_G = task.rewards(row, samples_G, pool)
        advantages_G = group_advantages(rewards_G, options["std_floor"], options["scale_std"])
        return [Rollout(row, prompt, *rest) for rest in zip(samples_G, rewards_G, advantages_G, notes_G)]

    pool, groups = ThreadPoolExecutor(options["threads"]), ThreadPoolExecutor(max(1, len(rows)))
    try:
        return list(groups.map(one_group, rows))
    finally:  # after an error nobody waits for requests in flight
        groups.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=False, cancel_futures=True)


MEANS = ("clipped_low", "clipped_high", "kl")  # what an update measures as a mean over its tokens


def update(model: Any, optimizer: Any, groups: Sequence[Any], options: Options, fresh: bool = False) -> Row:
    """One optimiser step of eq. 2 on `groups`, this rank's share of a minibatch; statistics over all ranks.

    Rollouts without reward do not count. Rollouts with advantage 0 count in the mean, but without a KL term
    they have no gradient and are not run. `fresh`: the model is still what the rollouts were sampled from.
    """
    rewarded = [r for group in groups for r in group if r.reward is not None]
    rollouts = [r for r in rewarded if r.advantage or options["beta"]]
    lengths = sum(len(r.sample.tokens_T) for r in rewarded)
    count, all_tokens, active = sft.over_ranks([len(rewarded), lengths, len(rollouts)])
    if not active:
        return {"tokens": 0}
    clip, beta = (options["clip_low"], options["clip_high"]), options["beta"]
    sums: Counter[str] = Counter()
    for packed in sft.pack([(r.prompt, r.sample.tokens_T) for r in rollouts], options["tokens_per_pass"]):
        members = [rollouts[i] for i in dict.fromkeys(packed.owners_A)]
        sizes = [len(r.sample.tokens_T) for r in members]
        norms = [1 / all_tokens if options["token_mean"] else 1 / (size * count) for size in sizes]
        new_A = sft.answer_logprobs(model, packed, options["temperature"])
        old_A = new_A.new_tensor([x for r in members for x in r.sample.logprobs_T])
        advantages_A = new_A.new_tensor([r.advantage for r, size in zip(members, sizes) for _ in range(size)])
        weights_A = new_A.new_tensor([norm for norm, size in zip(norms, sizes) for _ in range(size)])
        reference_A = None
        if beta:  # the base model, where every policy starts
            with torch.no_grad(), model.disable_adapter():
                reference_A = sft.answer_logprobs(model, packed, options["temperature"])
        grpo_loss(new_A, old_A, advantages_A, weights_A, clip, beta, reference_A).backward()

        gap_A = new_A.detach() - old_A
        sums["tokens"] += len(old_A)
        sums["logprob_gap"] += gap_A.abs().sum().item()
        sums["clipped_low"] += ((gap_A.exp() < 1 - clip[0]) & (advantages_A < 0)).sum().item()
        sums["clipped_high"] += ((gap_A.exp() > 1 + clip[1]) & (advantages_A > 0)).sum().item()
        if beta:
            difference = reference_A - new_A.detach()
            sums["kl"] += (difference.exp() - difference - 1).sum().item()
    names = ("tokens", "logprob_gap", *MEANS)
    tokens, *totals = sft.over_ranks([sums[name] for name in names])
    means = dict(zip(names[1:], (total / tokens for total in totals)))
    if fresh and (gap := means["logprob_gap"]) > 0.5:
        fail(f"sampler and trainer differ by {gap:.1f} a token: the server has other weights.")
    return {"tokens": tokens, **means, "grad_norm": sft.optimizer_step(model, optimizer, options["lr"])}


def publish(endpoint: Any, model: Any, folder: Path, step: int) -> str:
    """Serve the adapter as it is after `step` steps; the name of it. Rank 0 does it, all wait.

    Never the same name twice: the server would go on with the old weights, or with the old weights' prefix
    cache, without a word.
    """
    served, name = folder / "served", f"step-{step:06d}"
    if sft.rank_and_size()[0] == 0:
        if (served / f"step-{step - 1:06d}").exists():
            endpoint.unload_adapter(f"step-{step - 1:06d}")
        shutil.rmtree(served, ignore_errors=True)
        sft.save_adapter(model, served / name)
        endpoint.load_adapter(name, served / name)
    sft.over_ranks([0])
    return name


# --- What is kept of a step -----------------------------------------------------------------------

SAVE_ROLLOUTS, SHOW_EVERY = 32, 5


def gather_records(groups: Sequence[Sequence[Rollout]], step: int) -> list[Row]:
    """The rollouts of all ranks, rank by rank and group by group, as records to be kept."""
    rank, ranks = sft.rank_and_size()
    records = []
    for g, group in enumerate(groups):
        for n, r in enumerate(group):
            about = {"id": f"{step}-{rank}.{g}-{n}", "step": step, "prompt_id": r.row["id"]}
            about |= {"instruction": r.row["instruction"], "completion": r.sample.text}
            about |= {"tokens": len(r.sample.tokens_T), "finished": r.sample.finished}
            records.append({**about, "reward": r.reward, "advantage": round(r.advantage, 4), **r.notes})
    if ranks == 1:
        return records
    shares: list[Any] = [None] * ranks
    dist.all_gather_object(shares, records)
    return [record for share in shares for record in share]


def measure(records: Sequence[Row], updates: Sequence[Row], options: Options) -> Row:
    """What the batch says of the policy that sampled it, and the means over the step's updates.

    `logprob_gap` is of the first minibatch that ran, when trainer and sampler still have the same weights.
    """
    groups = [list(g) for _, g in itertools.groupby(records, key=lambda r: r["id"].rpartition("-")[0])]
    rewards = [[r["reward"] for r in group if r["reward"] is not None] for group in groups]
    spreads = [pstdev(group) if group else 0.0 for group in rewards]
    known, ran = [reward for group in rewards for reward in group], [u for u in updates if u["tokens"]]
    return {
        "reward": fmean(known) if known else None,
        "reward_std": fmean(spreads),
        "zero_variance_groups": fmean(spread < max(options["std_floor"], 1e-9) for spread in spreads),
        "length": fmean(r["tokens"] for r in records),
        "truncated": fmean(not r["finished"] for r in records),
        "invalid": fmean(r.get("cause") is not None for r in records),
        "rollouts": len(records),
        "prompt_ids": [group[0]["prompt_id"] for group in groups],
        "train_tokens": sum(u["tokens"] for u in updates),
        "logprob_gap": ran[0]["logprob_gap"] if ran else None,
        **{name: fmean(u[name] for u in ran) if ran else None for name in (*MEANS, "grad_norm")},
    }


def show(records: Sequence[Row], step: int) -> None:
    """Print the best and the worst rollout of the first prompt: look at them, not only at the curve."""
    first = [r for r in records if r["prompt_id"] == records[0]["prompt_id"] and r["reward"] is not None]
    for name, pick in (("worst", min), ("best ", max)) if first else ():
        record = pick(first, key=lambda r: r["reward"])
        text = " ".join(record["completion"].split())
        tqdm.write(f"  step {step}, {name} {record['reward']:5.2f}: {text[:160]}")


# --- The two tasks --------------------------------------------------------------------------------


def judge_task(options: Options, run: Path) -> Task:
    """A judge against gold labels: eq. 1, or eq. 3 for a pairwise one."""
    tokenizer, judge = annotate.load_tokenizer(options["model"]), options["judge_record"]
    rubrics, pairwise = sft.read_rubrics(run) if judge.get("rubrics") else None, judge.get("pairwise")
    labels = annotate.PAIRWISE_LABELS if pairwise else annotate.LABELS
    reward = pairwise_verifiable_reward if pairwise else verifiable_reward
    causes = {True: "ill-formed", False: None}

    def prompt(row: Row) -> list[int]:
        return sft.judge_prompt(tokenizer, sft.row_messages(row, rubrics), judge["reasoning"])

    def rewards(row: Row, samples_G: Sequence[Any], pool: Executor) -> Rewards:
        read_G = [read_score(s.text, judge["reasoning"], labels) if s.finished else None for s in samples_G]
        notes_G = [{"label": x, "gold": row["label"], "cause": causes[x is None]} for x in read_G]
        return [reward(label, row["label"]) for label in read_G], notes_G

    start = Path(options["start"]) if options["start"] else None
    return Task(sft.labelled(run, "judge_train", pairwise=pairwise), prompt, rewards, start)


Ask = Callable[..., Row]  # (instruction, output, other=None) -> verdict


def pointwise_rewards(ask: Ask, row: Row, samples_G: Sequence[Any], pool: Executor) -> Rewards:
    """The expected score of each rollout (paper, section 2.3)."""
    verdicts_G = list(pool.map(lambda sample: ask(row["instruction"], sample.text.strip()), samples_G))
    notes = ("label", "thinking", "cause")
    return [v["expected"] for v in verdicts_G], [{key: v.get(key) for key in notes} for v in verdicts_G]


def pairwise_rewards(ask: Ask, opponents: int, row: Row, samples_G: Sequence[Any], pool: Executor) -> Rewards:
    """Eq. 4: the share of the others in its group that a rollout beats; a tie is half a win.

    Each pair is judged once, in random order, because judges lean to one place. Calls grow as G^2, unless a
    rollout meets only its `opponents` nearest neighbours in a circle. An invalid judgement counts for none.
    """
    group, texts_G = len(samples_G), [sample.text.strip() for sample in samples_G]
    reach = opponents // 2 or group
    pairs = itertools.combinations(range(group), 2)
    games = [random.sample((a, b), 2) for a, b in pairs if min(b - a, group - b + a) <= reach]
    verdicts = list(pool.map(lambda game: ask(row["instruction"], texts_G[game[0]], texts_G[game[1]]), games))
    points: list[list[float]] = [[] for _ in range(group)]
    for (a, b), expected in zip(games, (verdict["expected"] for verdict in verdicts)):
        if expected is not None:  # 2 - expected is the probability that a is better
            points[a].append(0.5 if expected == 1.5 else float(expected < 1.5))
            points[b].append(1 - points[a][-1])
    causes = Counter(verdict["cause"] for verdict in verdicts if verdict["expected"] is None)
    notes_G = [{"games": len(p), "cause": None if p else str(dict(causes))} for p in points]
    return [fmean(p) if p else None for p in points], notes_G


def policy_task(options: Options, run: Path, ask: Ask | None) -> Task:
    """A policy against a frozen judge: its expected score, or eq. 4 for a pairwise judge."""
    tokenizer = annotate.load_tokenizer(options["model"])
    rows = annotate.read_jsonl(run / "annotations" / "instructions.jsonl", ["id", "split", "instruction"])
    rows = [row for row in rows if row["split"] == "policy_train"]
    rewards = partial(pointwise_rewards, ask)
    if (options["judge_record"] or {}).get("pairwise"):
        rewards = partial(pairwise_rewards, ask, options["opponents"])
    return Task(rows, lambda row: annotate.policy_prompt(tokenizer, row["instruction"]), rewards)


def fitting_rows(options: Options, task: Task) -> Iterator[Row]:
    """The rows whose prompt fits `max_prompt`, one by one: for 200,000, each rank tokenises for 6 minutes."""
    return (row for row in task.rows if len(task.prompt(row)) <= options["max_prompt"])


# --- Where everything runs: servers on their GPUs, ranks on theirs --------------------------------

GOLD, TRUTH = "gold", "truth"  # in place of a judge: the controls


@contextlib.contextmanager
def judge_to_please(options: Options, run: Path, door: Any) -> Iterator[Ask | None]:
    """The judge of a policy as a function; None where the judge itself is trained."""
    record = options["judge_record"]
    if options["task"] == "judge":
        yield None
    elif record:
        tokenizer = annotate.load_tokenizer(record["model"])
        judge = sft.open_judge(annotate.Endpoint(*door), tokenizer, "judge", record, run)
        yield partial(sft.ask_judge, judge)
    elif options["judge"] == TRUTH:
        yield lambda text, output: {"expected": annotate.truth(text, output)}
    else:
        gold = annotate.read_options(run / "annotations")
        with annotate.gold_endpoint(gold, run / "logs") as endpoint:
            yield partial(annotate.grade, gold, endpoint)


def train_rank(options: Options, run: Path, folder: Path, doors: Sequence[Any]) -> None:
    """What a rank does. `doors`: (url, key, model, retries) of the trained model's server, its judge's."""
    with judge_to_please(options, run, doors[-1]) as ask:
        task = policy_task(options, run, ask) if ask else judge_task(options, run)
        task.rows = list(fitting_rows(options, task))
        grpo(options, folder, annotate.Endpoint(*doors[0]), task)


def train(options: Options, run: Path, folder: Path, record: Row, adapter: Path | None = None) -> None:
    """Start the servers, train on all ranks, and write `record` to say that it is done.

    One server plays policy and judge (`adapter`) where both have the same base model. A server alone on a GPU
    takes 0.9 of its memory, servers that share one equal parts; half of it is left to a rank that trains.
    """
    task = policy_task(options, run, None) if options["task"] == "policy" else judge_task(options, run)
    if next(fitting_rows(options, task), None) is None:
        fail(f"{run}/annotations: no prompt of at most {options['max_prompt']} tokens to train on.")
    mine, others = options["policy_gpus"], options["judge_gpus"] if adapter else ""
    judge, ranks = options["judge_record"], set(options["train_gpus"].split(","))
    same = bool(adapter) and judge["model"] == options["model"]
    if same:
        mine, others = ",".join(dict.fromkeys(f"{mine},{others}".split(","))), ""

    def memory(gpus: str) -> float:
        users = 2 if set(mine.split(",")) & set(others.split(",")) else 1
        return (0.45 if set(gpus.split(",")) & ranks else 0.9) / users

    with contextlib.ExitStack() as stack:
        users = [options, judge] if same else [options]
        servers = [sft.serve_adapters(users, run, mine, 1 + same, memory(mine))]
        servers += [sft.serve_adapters([judge], run, others, 1, memory(others))] if others else []
        endpoints = [stack.enter_context(server) for server in servers]
        if adapter:
            endpoints[-1].load_adapter("judge", adapter)
        doors = [(endpoint.url, endpoint.key, endpoint.model, 2) for endpoint in endpoints]
        sft.on_ranks(train_rank, options["train_gpus"], options, run, folder, doors)
    shutil.rmtree(folder / "served", ignore_errors=True)
    annotate.write_json(folder / f"{options['task']}.json", record)


def report(folder: Path) -> None:
    """Print how the reward went: means over the first and the last fifth of the steps."""
    records = annotate.read_jsonl(folder / "metrics.jsonl", ["step", "reward"])
    part = max(1, len(records) // 5)
    for name in ("reward", "invalid", "length", "truncated"):
        ends = [[r[name] for r in rows if r[name] is not None] for rows in (records[:part], records[-part:])]
        print(f"{folder.name}: {name} {' -> '.join(f'{fmean(end):.2f}' if end else 'none' for end in ends)}")


# --- The commands ---------------------------------------------------------------------------------

LARGE = {"group": 8, "lr": 2e-5, "minibatches": 4, "tokens_per_pass": 8192, "checkpoint_every": 50}
JUDGE_PRESETS = {
    "gpu": {**LARGE, "steps": 100, "prompts": 64, "threads": 256},
    "node": {**LARGE, "steps": 150, "prompts": 256, "threads": 1024}
    | {"judge_gpus": "0,1,2,3,4,5", "train_gpus": "6,7"},
}
OUTPUT = {"max_prompt": 2048, "max_tokens": 2048, "std_floor": 0.1}
POLICY_PRESETS = {
    "gpu": {**LARGE, **OUTPUT, "steps": 1000, "prompts": 32, "threads": 256, "checkpoint_every": 100}
    | {"model": annotate.SMALL_MODEL, "lora_rank": 32},
    "node": {**LARGE, **OUTPUT, "steps": 1200, "prompts": 128, "threads": 1024, "checkpoint_every": 100}
    | {"model": "meta-llama/Llama-3.1-8B-Instruct", "lora_rank": 64}
    | {"policy_gpus": "0,1", "judge_gpus": "2,3,4,5", "train_gpus": "6,7"},
}
Run, JudgePreset, _ = annotate.run_and_preset(JUDGE_PRESETS)
PolicyRun, PolicyPreset, _ = annotate.run_and_preset(POLICY_PRESETS)
Start = StrEnum("Start", ["sft", "base"])

Steps = Annotated[int, Option(min=1, help="Each of --minibatches updates. Paper: 100-200, 1200.")]
Prompts = Annotated[int, Option(min=1, help="P, prompts of a step. Paper: batch 2048, 1024 (of what?).")]
Group = Annotated[int, Option(min=2, help="G, rollouts of a prompt. Paper: 8.")]
Minibatches = Annotated[int, Option(min=1, help="Optimiser steps of one batch. Paper: 4.")]
Rate = Annotated[float, Option(min=0, max=1, help="Learning rate. Paper: 1e-6, full fine-tuning.")]
Temperature = Annotated[float, Option(min=0.05, max=2, help="Of the rollouts. Paper: 1.0 judge, 0.7 policy.")]
StdFloor = Annotated[float, Option(min=0, help="Least std by which advantages are divided. Paper: silent.")]
ScaleStd = Annotated[bool, Option(help="Divide advantages by the group's std. Paper: yes.")]
TokenMean = Annotated[bool, Option(help="Mean over all tokens, not over each rollout's first. Paper: no.")]
ClipLow = Annotated[float, Option(min=0, max=1, help="eps_low of eq. 2. Paper: 0.2.")]
ClipHigh = Annotated[float, Option(min=0, max=1, help="eps_high of eq. 2. Paper: 0.3.")]
Every = Annotated[int, Option(min=1, help="Steps between two kept adapters.")]
Name = Annotated[str, Option(help="Name of the new folder. Default: the judge's.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0])


@app.command("judge")
def train_judge(
    ctx: typer.Context,
    run: Run,
    preset: JudgePreset = None,
    judge: Annotated[str, Option(help="To go on with: reasoning, direct, a --name of 02.")] = "reasoning",
    start: Annotated[Start, Option("--from", help="sft, or base: RL only (paper, section 4.1).")] = Start.sft,
    name: Name = "",
    steps: Steps = 4,
    prompts: Prompts = 4,
    group: Group = 6,
    minibatches: Minibatches = 2,
    lr: Rate = 3e-6,
    temperature: Temperature = 1.0,
    std_floor: StdFloor = 0.1,
    scale_std: ScaleStd = True,
    token_mean: TokenMean = False,
    clip_low: ClipLow = 0.2,
    clip_high: ClipHigh = 0.3,
    tokens_per_pass: sft.TokensPerPass = 512,
    checkpoint_every: Every = 1000,
    threads: annotate.Threads = 64,
    judge_gpus: annotate.Gpus = "0",
    train_gpus: annotate.Gpus = "0",
    seed: annotate.Seed = 0,
) -> None:
    """Train a judge on gold labels (eq. 1)."""
    options = {key: value for key, value in ctx.params.items() if key != "run"}
    judge = judge.removesuffix("-sft")
    folder = run / "judges" / f"{name or (f'{judge}-base' if start == 'base' else judge)}-rl"
    source, record = sft.find_judge(run, f"{judge}-sft")
    adapter = source / record["adapter"] if start == "sft" else None
    options["max_tokens"] = record["max_thinking"]
    options |= {key: record[key] for key in ("model", "lora_rank", "lora_modules", "max_prompt")}
    options |= {"task": "judge", "judge_record": record, "start": str(adapter or "")}
    options |= {"beta": 0.0, "policy_gpus": judge_gpus}
    room = options["max_prompt"] + options["max_tokens"]
    sft.check_context(options["model"], room, "--max-prompt and --max-thinking of stage 2")
    annotate.record_config(folder, options)
    if not (folder / "judge.json").exists():
        train(options, run, folder, {**record, "adapter": f"checkpoints/step-{steps:06d}"})
    report(folder)


@app.command("policy")
def train_policy(
    ctx: typer.Context,
    run: PolicyRun,
    judge: Annotated[str, Option(help="direct, reasoning, another folder of RUN/judges, gold, truth.")],
    preset: PolicyPreset = None,
    name: Name = "",
    model: Annotated[str, Option(help="Base model. Paper: Llama-3.1-8B, two more.")] = annotate.LAPTOP_MODEL,
    lora_rank: sft.LoraRank = 16,
    steps: Steps = 12,
    prompts: Prompts = 4,
    group: Group = 6,
    minibatches: Minibatches = 1,
    lr: Rate = 4e-4,
    beta: Annotated[float, Option(min=0, help="Of the KL term against the base model. Paper: 0.")] = 0.0,
    temperature: Temperature = 0.7,
    max_prompt: Annotated[int, Option(min=1, help="Longer prompts are left out. Paper: 2048.")] = 256,
    max_tokens: Annotated[int, Option(min=1, help="Longest output. Paper: 2048.")] = 40,
    std_floor: StdFloor = 0.05,
    scale_std: ScaleStd = True,
    token_mean: TokenMean = False,
    clip_low: ClipLow = 0.2,
    clip_high: ClipHigh = 0.3,
    opponents: Annotated[int, Option(min=0, help="Pairwise: so many others (even); 0: all.")] = 0,
    tokens_per_pass: sft.TokensPerPass = 512,
    checkpoint_every: Every = 4,
    threads: annotate.Threads = 64,
    policy_gpus: annotate.Gpus = "0",
    judge_gpus: annotate.Gpus = "0",
    train_gpus: annotate.Gpus = "0",
    seed: annotate.Seed = 0,
) -> None:
    """Train a policy against a judge (its expected score), or, as a control, straight on gold or truth."""
    options = {key: value for key, value in ctx.params.items() if key != "run"}
    folder = run / "policies" / (name or judge)
    options |= {"task": "policy", "judge_record": None, "lora_modules": sft.modules_of(options["preset"])}
    adapter, gold = None, annotate.read_options(run / "annotations")
    if judge not in (GOLD, TRUTH):
        source, options["judge_record"] = sft.find_judge(run, judge)
        options["judge"], adapter = source.name, source / options["judge_record"]["adapter"]
    elif gold["gold"] != "oracle" and (judge == TRUTH or not gold["gold_url"]):
        fail(f"--judge {judge}: truth is the laptop's; a chat gold must be served already (01 --gold-url).")
    if opponents % 2:
        fail(f"--opponents {opponents}: must be even, half of them on each side in the circle.")
    sft.check_context(model, max_prompt + max_tokens, "--max-prompt and --max-tokens")
    annotate.record_config(folder, options)
    if not (folder / "policy.json").exists():
        record = {key: value for key, value in options.items() if key != "judge_record"}
        train(options, run, folder, record, adapter)
    report(folder)


if __name__ == "__main__":
    annotate.start(app)
