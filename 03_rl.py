"""Stage 3: GRPO, written out. One loop, two rewards.

    judge    a judge learns to hit the gold label                     reward: eq. 1 (pairwise: eq. 3)
    policy   a policy learns to please a judge that is now frozen     reward: its expected score
                                                                              (pairwise: eq. 4)

What goes in:   RUN/annotations/; for `judge` RUN/judges/NAME-sft/ (--from base: its settings only);
                for `policy` RUN/judges/NAME-rl/ if it exists, else NAME-sft/
What comes out: RUN/judges/NAME-rl/ or RUN/policies/NAME/, with
                checkpoints/step-000004/ …   PEFT adapters
                metrics.jsonl                one record a step; reward.png draws four of its columns
                rollouts.jsonl               outputs with their rewards, some of each step

A step, as in nearly every RL of language models today:
 1. sample      G rollouts for each of P prompts from the vLLM server, with their log-probabilities
 2. reward      each rollout
 3. advantage   (r - mean) / std within the group of G, the std at least --std-floor; no value network
 4. update      minibatches of whole groups: eq. 2, AdamW on the LoRA weights
 5. publish     the adapter to the server under a new name; base weights never move

Simpler than the paper, and why:
 1. LoRA, at a higher learning rate: publishing is a file of some megabytes.
 2. The old log-probabilities of eq. 2 are the sampler's own: they belong to the distribution that the
    rollouts came from, and cost no forward pass. `logprob_gap` is their mean distance from the trainer's own,
    `ratio` the mean of exp(new - old) before any update: it should be 1. `--old-logprobs trainer` takes the
    trainer's own as old ones.
 3. A policy's rollout cut off at its length limit is judged and trained on like any other.
 4. No DDP: each rank works on its share of a step's prompts; one sum over the gradients joins them.

    python 03_rl.py judge  --run runs/demo --judge reasoning
    python 03_rl.py policy --run runs/demo --judge direct
    python 03_rl.py policy --run runs/demo --judge reasoning
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
Row, Options = annotate.Row, annotate.Options

# --- The maths: reward, advantage, loss -----------------------------------------------------------


def verifiable_reward(score: int | None, gold: int) -> float:
    """Eq. 1: -1 for an ill-formed judgement, else (M - (score - gold)^2) / M with M = (9 - 0)^2."""
    return -1.0 if score is None else (81 - (score - gold) ** 2) / 81


def pairwise_verifiable_reward(choice: int | None, gold: int) -> float:
    """Eq. 3: -1 for an ill-formed judgement, else 1 for gold's choice and 0 for the other."""
    return -1.0 if choice is None else float(choice == gold)


def read_score(text: str, reasoning: bool, labels: str = annotate.LABELS) -> int | None:
    """The digit of a whole judgement as a judge writes it, None if it is ill-formed or not one of `labels`.

    The digit stands right after the first `</think>` and an empty line, and ends the answer: no blank and no
    line end follow. Without `reasoning` the text is the digit alone, for the prompt holds the rest already.
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
    differ by a hair would be trained on as hard as any other. Where std and floor are 0, advantages are 0.
    `scale` False: no division (Dr. GRPO).
    """
    known = [r for r in rewards_G if r is not None]
    mean, spread = (fmean(known), max(pstdev(known), floor)) if known else (0.0, 0.0)
    spread = spread if scale else 1.0
    return [0.0 if r is None or spread == 0 else (r - mean) / spread for r in rewards_G]


def grpo_loss(
    logprobs_A: Any, old_A: Any, advantages_A: Any, weights_A: Any, clip: tuple[float, float],
    beta: float = 0.0, reference_A: Any = None,
) -> Any:  # fmt: skip
    """Minus eq. 2, summed over these A answer tokens; the parts of a minibatch are added up.

    `weights_A` is 1 / (|y| N): |y| tokens of the token's rollout, N rewarded rollouts of the minibatch, over
    all ranks. So the mean over tokens, then over rollouts, comes out right however it is cut. `clip` =
    (low, high) keeps the ratio in [1 - low, 1 + high]. Each token loses `beta` times the KL term, by the GRPO
    paper's estimator exp(ref - new) - (ref - new) - 1.
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
    """One completion of one prompt: what eq. 2 needs, and what is kept of it."""

    row: Row
    prompt: list[int]
    sample: Any  # tokens_T, logprobs_T, text, finished: annotate.Sample
    reward: float | None  # None: the judgement was invalid
    advantage: float
    notes: Row
    old_T: list[float]  # log pi_old of each token in eq. 2


Group = list[Rollout]  # the G rollouts of one prompt
Minibatch = list[Group]  # of one optimiser step; a step's batch is a list of them. Here: this rank's share
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
    done, state = sft.latest_state(folder)
    model, optimizer = sft.load_training(options, state, task.start)
    if rank == 0:
        print(f"{options['steps']} steps, {done} of them done", flush=True)
        sft.rewind(folder / "metrics.jsonl", done)
        sft.rewind(folder / "rollouts.jsonl", done)
    prompts_each = math.ceil(options["prompts"] / options["minibatches"])  # of a minibatch, over all ranks
    adapter_name = publish(endpoint, model, folder, done)
    for step in tqdm(range(done, options["steps"]), initial=done, total=options["steps"], disable=rank > 0):
        began = time.perf_counter()
        rows_P = prompts_of_step(task.rows, step, options["prompts"], options["seed"])
        shares = [rows_P[i : i + prompts_each][rank::ranks] for i in range(0, len(rows_P), prompts_each)]
        batch = collect(endpoint, adapter_name, task, shares, options)  # sample, reward, advantage
        collected = time.perf_counter()
        if options["old_logprobs"] == "trainer":
            recompute_old_logprobs(model, batch, options)
        updates = [update(model, optimizer, minibatch, options) for minibatch in batch]  # eq. 2
        adapter_name = publish(endpoint, model, folder, step + 1)
        seconds = {"collect_seconds": collected - began, "seconds": time.perf_counter() - began}
        records = gather_records(batch, step)
        if rank == 0:
            keep_step(folder, step, records, {**measure(records, updates, options), **seconds})
            keep_weights(options, folder, step + 1, model, optimizer)


def prompts_of_step(rows: Sequence[Row], step: int, prompts: int, seed: int) -> list[Row]:
    """The rows of `step`: a new seeded order in every pass over the data, a function of the step alone."""
    places = [divmod(index, len(rows)) for index in range(step * prompts, (step + 1) * prompts)]
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(rows, len(rows)) for epoch, _ in places}
    return [orders[epoch][place] for epoch, place in places]


def collect(
    endpoint: Any, adapter_name: str, task: Task, shares: Sequence[Sequence[Row]], options: Options
) -> list[Minibatch]:
    """A group of G rollouts, rewarded, for each row in `shares`: what this rank has of each minibatch.

    All prompts are sampled at once; a group is judged while others are still sampled.
    """
    sampling_pool = ThreadPoolExecutor(max(1, sum(map(len, shares))))
    judging_pool = ThreadPoolExecutor(options["threads"])
    sampling = {"temperature": options["temperature"], "max_tokens": options["max_tokens"]}

    def one_group(row: Row) -> Group:
        prompt = task.prompt(row)
        samples_G = endpoint.sample(prompt, options["group"], adapter_name, **sampling)
        rewards_G, notes_G = task.rewards(row, samples_G, judging_pool)
        advantages_G = group_advantages(rewards_G, options["std_floor"], options["scale_std"])
        return [
            Rollout(row, prompt, sample, reward, advantage, notes, old_T=sample.logprobs_T)
            for sample, reward, advantage, notes in zip(samples_G, rewards_G, advantages_G, notes_G)
        ]

    try:
        futures_of = [[sampling_pool.submit(one_group, row) for row in rows] for rows in shares]
        batch = [[future.result() for future in futures] for futures in futures_of]
    finally:  # after an error nobody waits for requests in flight
        sampling_pool.shutdown(wait=False, cancel_futures=True)
        judging_pool.shutdown(wait=False, cancel_futures=True)
    causes = [rollout.notes.get("cause") for minibatch in batch for group in minibatch for rollout in group]
    if causes and all(map(annotate.request_failed, causes)):
        fail(f"all {len(causes)} judgements of this step failed. {causes[0]}")
    return batch


def packs_of(rollouts: Sequence[Rollout], options: Options) -> Iterator[tuple[Any, list[Rollout]]]:
    """The forward passes over `rollouts`, each with those that are in it, in the order of its tokens."""
    examples = [(rollout.prompt, rollout.sample.tokens_T) for rollout in rollouts]
    for packed in sft.pack(examples, options["tokens_per_pass"]):
        yield packed, [rollouts[index] for index in packed.members]


def recompute_old_logprobs(model: Any, batch: Sequence[Minibatch], options: Options) -> None:
    """Let old_T be the trainer's own log-probabilities before the step's first update, not the sampler's."""
    rollouts = [rollout for minibatch in batch for group in minibatch for rollout in group]
    for packed, members in packs_of(rollouts, options):
        with torch.no_grad():
            old_A = sft.answer_logprobs(model, packed, options["temperature"])
        parts = old_A.split([len(rollout.sample.tokens_T) for rollout in members])
        for rollout, old_T in zip(members, parts):
            rollout.old_T = old_T.tolist()


# Over the tokens of the rollouts that are run, as `update` says; kl is written as 0 where beta is 0.
MEANS = ("logprob_gap", "ratio", "clipped_low", "clipped_high", "kl")


def update(model: Any, optimizer: Any, minibatch: Minibatch, options: Options) -> Row:
    """One optimiser step of eq. 2 on this rank's share of a minibatch; statistics over all ranks.

    Rollouts without reward do not count. Rollouts with advantage 0 count in the mean, but without a KL term
    they have no gradient and are not run.
    """
    rewarded = [r for group in minibatch for r in group if r.reward is not None]
    active = [r for r in rewarded if r.advantage or options["beta"]]
    tokens_here = sum(len(r.sample.tokens_T) for r in rewarded)
    N, all_tokens, all_active = sft.over_ranks([len(rewarded), tokens_here, len(active)])
    if not all_active:
        return {"tokens": 0}
    clip, beta, reference_A = (options["clip_low"], options["clip_high"]), options["beta"], None
    sums: Counter[str] = Counter()
    for packed, members in packs_of(active, options):
        lengths = [len(r.sample.tokens_T) for r in members]
        new_A = sft.answer_logprobs(model, packed, options["temperature"])
        sampled_A = new_A.new_tensor([x for r in members for x in r.sample.logprobs_T])
        old_A = new_A.new_tensor([x for r in members for x in r.old_T])
        advantages_A = new_A.new_tensor([r.advantage for r in members for _ in r.old_T])
        weights_A = new_A.new_tensor([1 / (length * N) for length in lengths for _ in range(length)])
        if options["token_mean"]:
            weights_A = torch.full_like(new_A, 1 / all_tokens)
        if beta:  # the base model, where every policy starts
            with torch.no_grad(), model.disable_adapter():
                reference_A = sft.answer_logprobs(model, packed, options["temperature"])
        grpo_loss(new_A, old_A, advantages_A, weights_A, clip, beta, reference_A).backward()
        sums.update(token_sums(new_A.detach(), sampled_A, old_A, advantages_A, clip, reference_A))
    tokens, *totals = sft.over_ranks([sums[name] for name in ("tokens", *MEANS)])
    means = {name: total / tokens for name, total in zip(MEANS, totals)}
    return {"tokens": tokens, **means, "grad_norm": sft.optimizer_step(model, optimizer, options["lr"])}


def token_sums(
    new_A: Any, sampled_A: Any, old_A: Any, advantages_A: Any, clip: tuple[float, float], reference_A: Any
) -> dict[str, float]:
    """How many tokens a forward pass has, and the sums over them of what `MEANS` names."""
    ratio_A = (new_A - old_A).exp()
    values = {
        "logprob_gap": (new_A - sampled_A).abs(),
        "ratio": ratio_A,
        "clipped_low": (ratio_A < 1 - clip[0]) & (advantages_A < 0),
        "clipped_high": (ratio_A > 1 + clip[1]) & (advantages_A > 0),
    }
    if reference_A is not None:
        difference_A = reference_A - new_A
        values["kl"] = difference_A.exp() - difference_A - 1
    return {"tokens": len(new_A), **{name: values_A.sum().item() for name, values_A in values.items()}}


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

SAVE_ROLLOUTS, SHOW_EVERY, STATE_EVERY = 32, 5, 4
LARGEST_GAP = 0.5  # nats a token between sampler and trainer, which have the same weights


def keep_step(folder: Path, step: int, records: Sequence[Row], metrics: Row) -> None:
    """Write the step's metrics and some rollouts; a sampler that has other weights ends the command."""
    gap = metrics["logprob_gap"] or 0.0
    if gap > LARGEST_GAP:
        fail(f"sampler and trainer differ by {gap:.1f} a token: the server has other weights.")
    annotate.append_jsonl(folder / "metrics.jsonl", {"step": step, **metrics})
    for record in records[:SAVE_ROLLOUTS]:
        annotate.append_jsonl(folder / "rollouts.jsonl", record)
    rewarded = sorted((r for r in records if r["reward"] is not None), key=lambda r: r["reward"])
    if step % SHOW_EVERY == 0:  # the worst and the best: look at them, not only at the curve
        for record in rewarded[:1] + rewarded[-1:]:
            text = " ".join(record["completion"].split())
            tqdm.write(f"  step {step}, reward {record['reward']:5.2f}: {text[:160]}")


def keep_weights(options: Options, folder: Path, done: int, model: Any, optimizer: Any) -> None:
    """After `done` steps: an adapter for the evaluation every `checkpoint_every`, a state to resume from."""
    last = done == options["steps"]
    if last or done % options["checkpoint_every"] == 0:
        sft.save_adapter(model, folder / "checkpoints" / f"step-{done:06d}")
    if last or done % min(STATE_EVERY, options["checkpoint_every"]) == 0:
        sft.save_state(folder, done, model, optimizer)


def gather_records(batch: Sequence[Minibatch], step: int) -> list[Row]:
    """The rollouts of all ranks, rank by rank and group by group, as records to be kept."""
    rank, ranks = sft.rank_and_size()
    records = []
    for g, group in enumerate(itertools.chain(*batch)):
        for n, r in enumerate(group):
            about = {"id": f"{step}-{rank}.{g}-{n}", "step": step, "prompt_id": r.row["id"]}
            about |= {"instruction": r.row["instruction"], "completion": r.sample.text}
            about |= {"tokens": len(r.sample.tokens_T), "finished": r.sample.finished}
            records.append({**about, "reward": r.reward, "advantage": round(r.advantage, 4), **r.notes})
    if ranks == 1:
        return records
    shares: list[Any] = [None for _ in range(ranks)]
    dist.all_gather_object(shares, records)
    return list(itertools.chain(*shares))


def measure(records: Sequence[Row], updates: Sequence[Row], options: Options) -> Row:
    """What the batch says of the policy that sampled it, and the means over the step's updates.

    `logprob_gap` (mean |new - sampler's|, a token) and `ratio` (mean new/old) are of the first minibatch that
    ran, when trainer and sampler still have the same weights: 0 and 1, but for the two programs' rounding.
    """
    G = options["group"]
    groups = [records[i : i + G] for i in range(0, len(records), G)]
    rewards = [[r["reward"] for r in group if r["reward"] is not None] for group in groups]
    spreads = [pstdev(group) if group else 0.0 for group in rewards]
    known = [reward for group in rewards for reward in group]
    # The floor damps a group whose rewards differ less than it: the group's gradient is small, or none.
    damped = [spread < max(options["std_floor"], 1e-9) for spread in spreads]
    metrics = {
        "reward": fmean(known) if known else None,
        "reward_std": fmean(spreads),
        "zero_variance_groups": fmean(damped),
        "length": fmean(r["tokens"] for r in records),
        "truncated": fmean(not r["finished"] for r in records),
        "invalid": fmean(r.get("cause") is not None for r in records),
        "rollouts": len(records),
        "prompt_ids": [group[0]["prompt_id"] for group in groups],
        "train_tokens": sum(u["tokens"] for u in updates),
    }
    ran = [u for u in updates if u["tokens"]]
    for name in (*MEANS, "grad_norm"):
        counted = ran[:1] if name in ("logprob_gap", "ratio") else ran
        metrics[name] = fmean(u[name] for u in counted) if counted else None
    return metrics


# --- The two tasks --------------------------------------------------------------------------------


def rows_and_prompt(options: Options, run: Path) -> tuple[list[Row], Callable[[Row], list[int]]]:
    """The rows to train on, and the function that makes a row's prompt: of a policy, or of a judge."""
    tokenizer, judge_record = annotate.load_tokenizer(options["model"]), options["judge_record"]
    if options["task"] == "policy":
        rows = annotate.read_jsonl(run / "annotations" / "instructions.jsonl", ["id", "split", "instruction"])
        rows = [row for row in rows if row["split"] == "policy_train"]
        return rows, lambda row: annotate.policy_prompt(tokenizer, row["instruction"])
    rubrics = sft.read_rubrics(run) if judge_record.get("rubrics") else None

    def prompt(row: Row) -> list[int]:
        return sft.judge_prompt(tokenizer, sft.row_messages(row, rubrics), judge_record["reasoning"])

    return sft.labelled(run, "judge_train", pairwise=judge_record.get("pairwise")), prompt


def judge_task(options: Options, run: Path) -> Task:
    """A judge against gold labels: eq. 1, or eq. 3 for a pairwise one."""
    rows, prompt = rows_and_prompt(options, run)
    reasoning, pairwise = (options["judge_record"].get(key) for key in ("reasoning", "pairwise"))
    labels = annotate.PAIRWISE_LABELS if pairwise else annotate.LABELS
    reward = pairwise_verifiable_reward if pairwise else verifiable_reward

    def rewards(row: Row, samples_G: Sequence[Any], pool: Executor) -> Rewards:
        read_G = [read_score(s.text, reasoning, labels) if s.finished else None for s in samples_G]
        causes_G = ["ill-formed" if label is None else None for label in read_G]
        gold = row["label"]
        notes_G = [{"label": x, "gold": gold, "cause": cause} for x, cause in zip(read_G, causes_G)]
        return [reward(label, gold) for label in read_G], notes_G

    start = run / options["start_adapter"] if options["start_adapter"] else None
    return Task(rows, prompt, rewards, start)


Ask = Callable[..., Row]  # (instruction, output, other=None) -> verdict


def pointwise_rewards(ask: Ask, row: Row, samples_G: Sequence[Any], pool: Executor) -> Rewards:
    """The expected score of each rollout (paper, section 2.3)."""
    verdicts_G = list(pool.map(lambda sample: ask(row["instruction"], sample.text.strip()), samples_G))
    notes = ("label", "thinking", "cause")
    return [v["expected"] for v in verdicts_G], [{key: v.get(key) for key in notes} for v in verdicts_G]


def first_wins(verdict: Row) -> float | None:
    """1 if a pairwise judge finds the first output better, 0 for the second, 0.5 for a tie; None: invalid."""
    if verdict["expected"] is None:
        return None
    chance = 2 - verdict["expected"]  # of the first to be better, for the labels are 1 and 2
    return 0.5 if chance == 0.5 else float(chance > 0.5)


def pairwise_rewards(ask: Ask, opponents: int, row: Row, samples_G: Sequence[Any], pool: Executor) -> Rewards:
    """Eq. 4: the share of the others in its group that a rollout beats; a tie is half a win.

    Each pair is judged once, in random order, because judges lean to one place. Calls grow as G^2, unless a
    rollout meets only its `opponents` nearest neighbours in a circle. An invalid judgement counts for none.
    """
    texts_G = [sample.text.strip() for sample in samples_G]
    G = len(texts_G)
    reach = opponents // 2 if opponents else G
    games = []
    for a, b in itertools.combinations(range(G), 2):
        distance_in_circle = min(b - a, G - (b - a))
        if distance_in_circle <= reach:
            games.append(random.sample((a, b), 2))
    verdicts = list(pool.map(lambda game: ask(row["instruction"], texts_G[game[0]], texts_G[game[1]]), games))
    points_G: list[list[float]] = [[] for _ in range(G)]
    causes_G: list[str | None] = [None for _ in range(G)]
    for (first, second), verdict in zip(games, verdicts):
        won = first_wins(verdict)
        if won is None:
            causes_G[first] = causes_G[second] = verdict["cause"]
        else:
            points_G[first].append(won)
            points_G[second].append(1 - won)
    rewards_G, notes_G = [], []
    for points, cause in zip(points_G, causes_G):
        rewards_G.append(fmean(points) if points else None)
        notes_G.append({"games": len(points), "cause": None if points else cause})
    return rewards_G, notes_G


def policy_task(options: Options, run: Path, ask: Ask) -> Task:
    """A policy against a frozen judge, asked by `ask`: its expected score, or eq. 4 for a pairwise judge."""
    rows, prompt = rows_and_prompt(options, run)
    rewards = partial(pointwise_rewards, ask)
    if (options["judge_record"] or {}).get("pairwise"):
        rewards = partial(pairwise_rewards, ask, options["opponents"])
    return Task(rows, prompt, rewards)


# --- Where everything runs: servers on their GPUs, ranks on theirs --------------------------------

GOLD, TRUTH = "gold", "truth"  # in place of a judge: the controls


def judge_to_please(options: Options, run: Path, judge_address: Any) -> Ask:
    """The judge of a policy, as a function; `judge_address`: of the server that plays it, if we serve it."""
    judge_record = options["judge_record"]
    if judge_record:
        endpoint = annotate.Endpoint(*judge_address)
        tokenizer = annotate.load_tokenizer(judge_record["model"])
        return partial(sft.ask_judge, sft.served_judge(endpoint, tokenizer, "judge", judge_record, run))
    if options["judge"] == TRUTH:
        return lambda instruction, output: {"expected": annotate.truth(instruction, output)}
    gold, endpoint = annotate.read_options(run / "annotations"), None
    if gold["gold"] != "oracle":
        endpoint = annotate.open_endpoint(gold["gold_url"], gold["gold"], "GOLD_API_KEY")
    return partial(annotate.grade, gold, endpoint)


def train_rank(
    options: Options, run: Path, folder: Path, ids: set[str], sampler_address: Any, judge_address: Any
) -> None:
    """Train on the rows `ids`, as one rank."""
    if options["task"] == "judge":
        task = judge_task(options, run)
    else:
        task = policy_task(options, run, judge_to_please(options, run, judge_address))
    task.rows = [row for row in task.rows if row["id"] in ids]
    grpo(options, folder, annotate.Endpoint(*sampler_address), task)


def train(
    options: Options, run: Path, folder: Path, record: Row, gpus: str, judge_adapter: Path | None = None
) -> None:
    """Start the servers, train on all ranks, and write `record` to say that it is done.

    `gpus`: of the server that samples. `judge_adapter`: of the judge to please, where we serve it.
    """
    rows, prompt = rows_and_prompt(options, run)
    ids = {row["id"] for row in rows if len(prompt(row)) <= options["max_prompt"]}
    if not ids:
        fail(f"{run}/annotations: no prompt of at most {options['max_prompt']} tokens to train on.")
    judge_gpus, train_gpus = options["judge_gpus"], options["train_gpus"]
    judge_record = options["judge_record"]
    if judge_adapter is None:  # a judge in training, or a control: there is no judge to serve
        servers = [sft.serve_adapters([options], run, gpus, 1, [train_gpus])]
    elif judge_record["model"] == options["model"]:  # one server plays both
        shared_gpus = ",".join(sorted({*gpus.split(","), *judge_gpus.split(",")}))
        servers = [sft.serve_adapters([options, judge_record], run, shared_gpus, 2, [train_gpus])]
    else:
        servers = [sft.serve_adapters([options], run, gpus, 1, [train_gpus, judge_gpus])]
        servers.append(sft.serve_adapters([judge_record], run, judge_gpus, 1, [train_gpus, gpus]))
    with contextlib.ExitStack() as stack:
        endpoints = [stack.enter_context(server) for server in servers]
        if judge_adapter:
            endpoints[-1].load_adapter("judge", judge_adapter)
        # The first server samples, the last judges. A rank opens endpoints of its own: these do not pickle.
        addresses = [(endpoint.url, endpoint.key, endpoint.model, 2) for endpoint in endpoints]  # 2: retries
        sft.on_ranks(train_rank, train_gpus, options, run, folder, ids, addresses[0], addresses[-1])
    shutil.rmtree(folder / "served", ignore_errors=True)
    annotate.write_json(folder / f"{options['task']}.json", record)


def report(folder: Path) -> None:
    """Draw how the rewards, the lengths and the shares of invalid and of cut-off rollouts went."""
    records = annotate.read_jsonl(folder / "metrics.jsonl", ["step", "reward"])
    figure, names = annotate.new_figure(8, 5), ("reward", "length", "invalid", "truncated")
    for axis, name in zip(figure.subplots(2, 2, sharex=True).flat, names):
        axis.plot([record["step"] for record in records], [record[name] for record in records], ".-")
        axis.set_title(name)
    figure.supxlabel(f"training step of {folder.name}")
    figure.savefig(folder / "reward.png", dpi=100)
    print(f"picture: {folder / 'reward.png'}")


# --- The commands ---------------------------------------------------------------------------------

LARGE = {"group": 8, "lr": 2e-5, "minibatches": 4, "tokens_per_pass": 8192, "checkpoint_every": 50}
LARGE |= {"checkpointing": True}
FLOOR = {"std_floor": 0.01}  # on the scale of eq. 1, where to be wrong by a point costs 1/81
JUDGE_PRESETS = {
    "gpu": {**LARGE, **FLOOR, "steps": 100, "prompts": 64, "threads": 256},
    "node": {**LARGE, **FLOOR, "steps": 150, "prompts": 256, "threads": 1024}
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
JudgeRun = Annotated[Path, annotate.run_option(JUDGE_PRESETS)]
PolicyRun = Annotated[Path, annotate.run_option(POLICY_PRESETS)]
Start = StrEnum("Start", ["sft", "base"])
Old = StrEnum("Old", ["sampler", "trainer"])

Steps = Annotated[int, Option(min=1, help="Of --minibatches updates. Paper: judge 100-200, policy 1200.")]
Prompts = Annotated[int, Option(min=1, help="P of a step. Paper: batch 2048 judge, 1024 policy; no unit.")]
GroupSize = Annotated[int, Option(min=2, help="G, rollouts of a prompt. Paper: 8.")]
Minibatches = Annotated[int, Option(min=1, help="Optimiser steps of one batch. Paper: 4.")]
Rate = Annotated[float, Option(min=0, max=1, help="Learning rate. Paper: 1e-6, full fine-tuning.")]
Temperature = Annotated[float, Option(min=0.05, max=2, help="Of the rollouts. Paper: 1.0 judge, 0.7 policy.")]
StdFloor = Annotated[float, Option(min=0, help="Least std by which advantages are divided. Paper: silent.")]
ScaleStd = Annotated[bool, Option(help="Divide advantages by the group's std. Paper: yes.")]
TokenMean = Annotated[bool, Option(help="Mean over all tokens at once, not by rollout first. Paper: no.")]
ClipLow = Annotated[float, Option(min=0, max=1, help="eps_low of eq. 2. Paper: 0.2.")]
ClipHigh = Annotated[float, Option(min=0, max=1, help="eps_high of eq. 2. Paper: 0.3.")]
Every = Annotated[int, Option(min=1, help="Steps between two kept adapters.")]
OldLogprobs = Annotated[Old, Option(help="Whose log-probabilities are pi_old of eq. 2. Paper: silent.")]
Name = Annotated[str, Option(callback=sft.check_name, help="Of the new folder. Default: the judge's.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0])


@app.command("judge")
def train_judge(
    run: JudgeRun,
    judge: Annotated[str, Option(help="To go on with: reasoning, direct, a --name of 02.")] = "reasoning",
    start: Annotated[Start, Option("--from", help="sft, or base: RL only (paper, section 4.1).")] = Start.sft,
    name: Name = "",
    steps: Steps = 4,
    prompts: Prompts = 4,
    group: GroupSize = 6,
    minibatches: Minibatches = 2,
    lr: Rate = 1e-5,
    temperature: Temperature = 1.0,
    std_floor: StdFloor = 0.1,
    scale_std: ScaleStd = True,
    token_mean: TokenMean = False,
    clip_low: ClipLow = 0.2,
    clip_high: ClipHigh = 0.3,
    old_logprobs: OldLogprobs = Old.sampler,
    tokens_per_pass: sft.TokensPerPass = 512,
    checkpointing: sft.Checkpointing = False,
    checkpoint_every: Every = 1000,
    threads: annotate.Threads = 64,
    judge_gpus: annotate.Gpus = "0",
    train_gpus: annotate.Gpus = "0",
    seed: annotate.Seed = 0,
) -> None:
    """Train a judge on gold labels (eq. 1)."""
    options = dict(locals())  # the options by their names: nothing else has a value yet
    del options["run"]
    judge = judge.removesuffix("-sft")
    default = f"{judge}-base" if start == "base" else judge
    folder = run / "judges" / f"{name or default}-rl"
    source, judge_record = sft.find_judge(run, f"{judge}-sft")
    start_adapter = f"judges/{source.name}/{judge_record['adapter']}"  # relative: a run may be moved
    if start == "base":
        start_adapter = ""
    options["max_tokens"] = judge_record["max_thinking"]
    options |= {key: judge_record[key] for key in ("model", "lora_rank", "lora_modules", "max_prompt")}
    options |= {"task": "judge", "judge_record": judge_record, "start_adapter": start_adapter}
    options["beta"] = 0.0
    room = options["max_prompt"] + options["max_tokens"]
    sft.check_context(options["model"], room, "--max-prompt and --max-thinking of stage 2")
    annotate.record_config(folder, options)
    if not (folder / "judge.json").exists():
        before = source.name if start_adapter else ""  # stage 4 compares agreement before and after
        record = {**judge_record, "adapter": f"checkpoints/step-{steps:06d}", "before": before}
        train(options, run, folder, record, judge_gpus)
    report(folder)


@app.command("policy")
def train_policy(
    run: PolicyRun,
    judge: Annotated[str, Option(help="direct, reasoning, another folder of RUN/judges, gold, truth.")],
    name: Name = "",
    model: Annotated[str, Option(help="Base model. Paper: Llama-3.1-8B, two more.")] = annotate.LAPTOP_MODEL,
    lora_rank: sft.LoraRank = 16,
    steps: Steps = 10,
    prompts: Prompts = 8,
    group: GroupSize = 6,
    minibatches: Minibatches = 2,
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
    old_logprobs: OldLogprobs = Old.sampler,
    tokens_per_pass: sft.TokensPerPass = 512,
    checkpointing: sft.Checkpointing = False,
    checkpoint_every: Every = 2,
    threads: annotate.Threads = 64,
    policy_gpus: annotate.Gpus = "0",
    judge_gpus: annotate.Gpus = "0",
    train_gpus: annotate.Gpus = "0",
    seed: annotate.Seed = 0,
) -> None:
    """Train a policy against a judge (its expected score), or, as a control, straight on gold or truth."""
    options = dict(locals())  # the options by their names: nothing else has a value yet
    del options["run"]
    folder = run / "policies" / (name or judge)
    judge_adapter, gold = None, annotate.read_options(run / "annotations")
    options |= {"task": "policy", "judge_record": None, "lora_modules": sft.modules_of(gold["preset"])}
    if judge not in (GOLD, TRUTH):
        source, options["judge_record"] = sft.find_judge(run, judge)
        options["judge"], judge_adapter = source.name, source / options["judge_record"]["adapter"]
    elif gold["gold"] != "oracle" and (judge == TRUTH or not gold["gold_url"]):
        fail(f"--judge {judge}: truth is the laptop's; a chat gold must be served already (01 --gold-url).")
    if opponents % 2:
        fail(f"--opponents {opponents}: must be even, half of them on each side in the circle.")
    sft.check_context(model, max_prompt + max_tokens, "--max-prompt and --max-tokens")
    annotate.record_config(folder, options)
    if not (folder / "policy.json").exists():
        record = {key: value for key, value in options.items() if key != "judge_record"}
        train(options, run, folder, record, policy_gpus, judge_adapter)
    report(folder)


if __name__ == "__main__":
    annotate.start(app)
