"""Stage 3: GRPO, written out. One loop, two rewards.

    judge    a judge learns to hit the gold label                     reward: eq. 1 (pairwise: eq. 3)
    policy   a policy learns to please a judge that is now frozen     reward: its expected score (eq. 4)

What goes in:   RUN/annotations/, and RUN/judges/NAME-sft/ from stage 2 (or, with --from base, nothing)
What comes out: RUN/judges/NAME-rl/ (judge) or RUN/policies/NAME/ (policy), each with
                checkpoints/step-000010/ …   PEFT adapters
                metrics.jsonl                one record a step
                rollouts.jsonl               outputs with their rewards, some of each step
                failed-*.jsonl               the batch of a step that was not sound

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
 4. No DDP: each rank samples, judges and trains on its own share of a step's prompts, and one sum
    over the adapter's gradients joins them (`on_ranks` in stage 2).

    python 03_rl.py judge  --preset laptop --run runs/demo --judge reasoning
    python 03_rl.py policy --preset laptop --run runs/demo --judge direct
    python 03_rl.py policy --preset laptop --run runs/demo --judge reasoning
    python 03_rl.py policy --preset node   --run runs/paper --judge reasoning --policy-gpus 0,1 --judge-gpus 2,3,4,5 --train-gpus 6,7
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache, partial
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


def pairwise_verifiable_reward(choice: int | None, gold: int) -> float:
    """Eq. 3: -1 for an ill-formed judgement, else 1 for gold's choice and 0 for the other."""
    return -1.0 if choice is None else float(choice == gold)


def read_score(text: str, reasoning: bool, labels: str = annotate.LABELS) -> int | None:
    """The digit of a whole judgement as a judge writes it, None if it is ill-formed or not one of `labels`.

    The digit stands right after the first `</think>` and an empty line, and ends the answer.
    """
    if reasoning:
        _, closed, text = text.partition(annotate.THINK_CLOSE)
        if not closed or not text.startswith(annotate.AFTER_THINKING):
            return None
        text = text.removeprefix(annotate.AFTER_THINKING)
    return int(text) if re.fullmatch(f"[{labels}]", text) else None


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
# Sample and reward, as one stream.
# ---------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One completion of one prompt. `reward` is None where the judgement was unusable."""

    row: dict[str, Any]
    prompt: list[int]
    sample: Any  # tokens_T, logprobs_T, text, finished: annotate.Sample
    reward: float | None
    notes: dict[str, Any]
    advantage: float = 0.0


Verdict = tuple[float | None, dict[str, Any]]  # reward, what to note down beside it


@dataclass
class Task:
    """What the loop is asked to maximise: it knows nothing else of judges and policies.

    `rewards(row, samples_G, calls)` is given the futures of a group's samples, and the pool in which
    to ask its judge; it returns the group's verdicts, in order.
    """

    rows: Sequence[dict[str, Any]]
    prompt: Callable[[dict[str, Any]], list[int]]
    rewards: Callable[[dict[str, Any], Sequence[Future[Any]], Executor], list[Verdict]]
    start: Path | None  # adapter to begin with


def one_by_one(reward: Callable[[dict[str, Any], Any], Verdict]) -> Callable[..., list[Verdict]]:
    """`Task.rewards` for a pointwise reward: each rollout is judged the moment it is finished."""

    def rewards(row: dict[str, Any], samples_G: Sequence[Future[Any]], calls: Executor) -> list[Verdict]:
        judged = {sample: calls.submit(reward, row, sample.result()) for sample in as_completed(samples_G)}
        return [judged[sample].result() for sample in samples_G]

    return rewards


def against_each_other(
    wins: Callable[[dict[str, Any], Any, Any], float | None], group: int, opponents: int, both_orders: bool
) -> Callable[..., list[Verdict]]:
    """`Task.rewards` of eq. 4: the share of the others in its group that a rollout beats.

    `wins(row, first, second)` asks the judge: 1 where the sample shown first is better, 0 where the
    second, None where the judgement is unusable, which then counts for neither. Two rollouts are
    compared once, in random order, the moment both are finished; with `both_orders` twice, because
    judges lean to one place. Calls grow as G^2, unless each meets only its `opponents` nearest
    neighbours in a circle.
    """
    reach = min(opponents // 2 if opponents else group, group // 2)

    def rewards(row: dict[str, Any], samples_G: Sequence[Future[Any]], calls: Executor) -> list[Verdict]:
        games: dict[tuple[int, int], Future[float | None]] = {}
        there: list[int] = []
        places = {sample: place for place, sample in enumerate(samples_G)}
        for sample in as_completed(samples_G):
            new = places[sample]
            for old in there:
                if min((new - old) % group, (old - new) % group) <= reach:
                    for a, b in [(new, old), (old, new)] if both_orders else [random.sample((new, old), 2)]:
                        games[a, b] = calls.submit(wins, row, samples_G[a].result(), samples_G[b].result())
            there.append(new)
        points: list[list[float]] = [[] for _ in samples_G]
        for (a, b), game in games.items():
            if (won := game.result()) is not None:
                points[a].append(won)
                points[b].append(1 - won)
        games_each = len(games) * 2 / group
        return [(fmean(p) if p else None, {"invalid": not p, "unusable_games": games_each - len(p)}) for p in points]

    return rewards


def prompts_of_step(rows: Sequence[dict[str, Any]], step: int, prompts: int, seed: int) -> list[dict[str, Any]]:
    """The rows of `step`: a new seeded order in every pass over the data, a function of the step alone."""

    @cache
    def order(epoch: int) -> list[int]:
        return random.Random(f"{seed} {epoch}").sample(range(len(rows)), len(rows))

    places = (divmod(index, len(rows)) for index in range(step * prompts, (step + 1) * prompts))
    return [rows[order(epoch)[place]] for epoch, place in places]


def collect(
    endpoint: Any, adapter: str, task: Task, rows: Sequence[dict[str, Any]], options: dict[str, Any]
) -> tuple[list[list[Rollout]], dict[str, float]]:
    """A group of G rewarded rollouts for each of `rows`, and the seconds that sampling, and then judging, took."""
    began = time.perf_counter()
    ends = [began]

    def one_group(row: dict[str, Any]) -> list[Rollout]:
        prompt, server = task.prompt(row), endpoint.replica()  # one server computes the prompt once for all

        def draw() -> Any:
            (sample,) = server.sample(prompt, model=adapter, temperature=options["temperature"], max_tokens=options["max_tokens"])
            ends.append(time.perf_counter())
            return sample

        samples_G = [calls.submit(draw) for _ in range(options["group"])]
        verdicts = task.rewards(row, samples_G, calls)
        return [Rollout(row, prompt, s.result(), reward, notes) for s, (reward, notes) in zip(samples_G, verdicts)]

    with ThreadPoolExecutor(max(1, len(rows))) as groups, ThreadPoolExecutor(options["threads"]) as calls:
        found = list(groups.map(one_group, rows))
    for group in found:
        for rollout, advantage in zip(group, group_advantages([r.reward for r in group], options["std_floor"])):
            rollout.advantage = advantage
    sampled = max(ends)
    return found, {"sample_seconds": sampled - began, "judge_seconds": time.perf_counter() - sampled}


# ---------------------------------------------------------------------------------------------
# Update.
# ---------------------------------------------------------------------------------------------


def update(model: Any, optimizer: Any, groups: Sequence[Sequence[Rollout]], options: dict[str, Any]) -> dict[str, float]:
    """One optimiser step of eq. 2 on `groups`, this rank's share of a minibatch; statistics over all ranks.

    Rollouts without reward do not count. Rollouts with advantage 0 count in the mean, but without
    a KL term they have no gradient and are not run.
    """
    import torch

    rewarded = [r for group in groups for r in group if r.reward is not None]
    rollouts = [r for r in rewarded if r.advantage or options["beta"]]
    count, active = sft.over_ranks([len(rewarded), len(rollouts)])
    if not active:
        return dict.fromkeys(("tokens", "clipped_low", "clipped_high", "gap", "kl", "gap_max", "grad_norm"), 0.0)
    clip = (options["clip_low"], options["clip_high"])
    sums: Counter[str] = Counter()
    gap_max = 0.0
    device = next(model.parameters()).device

    def per_token(members: Sequence[Rollout], value: Callable[[Rollout], Sequence[float]]) -> torch.Tensor:
        return torch.tensor([x for r in members for x in value(r)], dtype=torch.float32, device=device)

    for packed in sft.pack([(r.prompt, r.sample.tokens_T) for r in rollouts], options["tokens_per_pass"]):
        members = [rollouts[i] for i in dict.fromkeys(packed.owners_A)]
        old_A = per_token(members, lambda r: r.sample.logprobs_T)
        advantages_A = per_token(members, lambda r: [r.advantage] * len(r.sample.tokens_T))
        weights_A = per_token(members, lambda r: [1 / (len(r.sample.tokens_T) * count)] * len(r.sample.tokens_T))
        reference_A = None
        if options["beta"]:
            with torch.no_grad(), model.disable_adapter():
                reference_A = sft.answer_logprobs(model, packed, options["temperature"])
        logprobs_A = sft.answer_logprobs(model, packed, options["temperature"])
        grpo_loss(logprobs_A, old_A, advantages_A, weights_A, clip, options["beta"], reference_A).backward()

        with torch.no_grad():
            gap_A = logprobs_A - old_A
            gap_max = max(gap_max, gap_A.abs().max().item())
            sums["tokens"] += len(old_A)
            sums["gap"] += gap_A.abs().sum().item()
            sums["clipped_low"] += ((gap_A.exp() < 1 - clip[0]) & (advantages_A < 0)).sum().item()
            sums["clipped_high"] += ((gap_A.exp() > 1 + clip[1]) & (advantages_A > 0)).sum().item()
            if reference_A is not None:
                sums["kl"] += ((reference_A - logprobs_A).exp() - (reference_A - logprobs_A) - 1).sum().item()
    sft.sum_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(sft.trainable(model), 1.0).item()
    names = ("tokens", "clipped_low", "clipped_high", "gap", "kl")
    tokens, *others = sft.over_ranks([sums[name] for name in names])
    (gap_max,) = sft.over_ranks([gap_max], "MAX")
    if not math.isfinite(norm) or gap_max > EXPLODED:
        raise FloatingPointError(f"the gradient's norm is {norm}, the largest |log ratio| of a token {gap_max:.1f}")
    optimizer.step()
    optimizer.zero_grad()
    shares = dict(zip(names[1:], (value / tokens for value in others)))
    return {"tokens": tokens, **shares, "gap_max": gap_max, "grad_norm": norm}


def publish(endpoint: Any, model: Any, folder: Path, name: str, old: str | None) -> None:
    """Serve the adapter as it is now as `name`; retire `old`, with which nothing is sampled any more.

    Never the same name twice: the server would go on with the old weights, or with the old
    weights' prefix cache, without a word.
    """
    if old:
        endpoint.unload_adapter(old)
        shutil.rmtree(folder / "served" / old)
    model.save_pretrained(folder / "served" / name)
    endpoint.load_adapter(name, folder / "served" / name)


# ---------------------------------------------------------------------------------------------
# The loop.
# ---------------------------------------------------------------------------------------------

EXPLODED = 20.0  # |log ratio| of a token that no sound update brings about: e^20
LOST_SERVER = 75  # exit status of a rank whose server is gone (EX_TEMPFAIL)


def grpo(options: dict[str, Any], folder: Path, endpoint: Any, task: Task, lineage: str = "step") -> None:
    """Train for `options["steps"]` steps, on every rank; goes on from the newest saved state in `folder`.

    `lineage` begins the names under which adapters are served: new for every start of a command.
    """
    rank, ranks = sft.world()
    first, state = sft.latest_state(folder)
    model = sft.load_model(
        options["model"], state or task.start, options["lora_rank"], options["lora_modules"], options["seed"]
    )
    optimizer = sft.make_optimizer(model, options["lr"])
    if state:
        sft.restore_optimizer(optimizer, model, state)
    size = math.ceil(options["prompts"] / options["minibatches"])

    def name(step: int) -> str:  # of the adapter after `step` steps
        return f"{lineage}-{step:06d}"

    def sample(step: int, adapter: str) -> tuple[list[list[list[Rollout]]], dict[str, float]]:
        """This rank's groups of `step`, minibatch by minibatch."""
        rows_P = prompts_of_step(task.rows, step, options["prompts"], options["seed"])
        shares = [rows_P[i : i + size][rank::ranks] for i in range(0, len(rows_P), size)]
        groups, seconds = collect(endpoint, adapter, task, [row for share in shares for row in share], options)
        left = iter(groups)
        return [list(itertools.islice(left, len(share))) for share in shares], seconds

    if rank == 0:
        print(f"going on after step {first} of {options['steps']}" if state else f"{options['steps']} steps", flush=True)
        for file in ("metrics.jsonl", "rollouts.jsonl"):
            sft.rewind_metrics(folder / file, first)
        shutil.rmtree(folder / "served", ignore_errors=True)
        publish(endpoint, model, folder, name(first), None)
    sft.barrier()
    ahead, upcoming = ThreadPoolExecutor(1), None
    bar = tqdm(range(first, options["steps"]), initial=first, total=options["steps"], desc=folder.name, disable=rank > 0)
    for step in bar:
        began = time.perf_counter()
        try:
            minibatches, seconds = upcoming.result() if upcoming else sample(step, name(step))
        except Exception:
            if rank == 0:  # the step can be repeated from here
                sft.save_state(folder, step, model, optimizer)
            raise
        stale = upcoming is not None
        last = step + 1 == options["steps"]
        # With --overlap the next batch is sampled while this one trains, from the adapter of this moment.
        upcoming = ahead.submit(sample, step + 1, name(step)) if options["overlap"] and not last else None

        training = time.perf_counter()
        try:
            updates = [update(model, optimizer, groups, options) for groups in minibatches]
        except FloatingPointError as error:
            stop_for_inspection(folder, step, minibatches, str(error))
        seconds["train_seconds"] = time.perf_counter() - training
        if updates[0]["gap"] > 0.5 and not stale:
            stop_for_inspection(
                folder, step, minibatches, "before any update the trainer's log-probabilities differ from the sampler's by "
                f"{updates[0]['gap']:.2f} a token on average: the server does not serve the adapter trained here",
            )  # fmt: skip

        publishing = time.perf_counter()
        if rank == 0:
            retired = step - 1 if options["overlap"] else step
            publish(endpoint, model, folder, name(step + 1), name(retired) if retired >= first else None)
        sft.barrier()
        seconds |= {"publish_seconds": time.perf_counter() - publishing, "seconds": time.perf_counter() - began}
        groups = gather_groups(step, minibatches)
        if rank:
            continue
        metrics = {"step": step, **measure(groups, options), **merge(updates), **seconds, "stale": stale, "lr": options["lr"]}
        annotate.append_jsonl(folder / "metrics.jsonl", metrics)
        save_rollouts(folder / "rollouts.jsonl", groups, options)
        bar.set_postfix({key: metrics[key] and round(metrics[key], 2) for key in ("reward", "length", "invalid")})
        if (step + 1) % options["show_every"] == 0:
            show(groups, step)
        if (step + 1) % options["checkpoint_every"] == 0 or last:
            model.save_pretrained(folder / "checkpoints" / f"step-{step + 1:06d}")
        if (step + 1) % options["save_every"] == 0 or last:
            sft.save_state(folder, step + 1, model, optimizer)
    if rank == 0:
        for served in sorted((folder / "served").glob("*")):
            endpoint.unload_adapter(served.name)
        shutil.rmtree(folder / "served")


def stop_for_inspection(folder: Path, step: int, minibatches: Sequence[Sequence[Sequence[Rollout]]], why: str) -> None:
    """End the command; the batch at fault, tokens and log-probabilities included, stays in a file."""
    path = folder / f"failed-{step:06d}-rank{sft.world()[0]}.jsonl"
    annotate.write_jsonl(path, [asdict(r) for groups in minibatches for group in groups for r in group])
    annotate.fail(f"{folder}: step {step} is not sound: {why}. Its batch is in {path}. Lower --lr, or look there.")


def gather_groups(step: int, minibatches: Sequence[Sequence[Sequence[Rollout]]]) -> list[list[dict[str, Any]]]:
    """On rank 0 the step's groups of all ranks, in the order of its prompts, as records to be kept."""
    rank, ranks = sft.world()
    mine = [
        [{
            "prompt_id": r.row["id"], **{key: r.row[key] for key in ("instruction", "output") if key in r.row},
            "completion": r.sample.text, "tokens": len(r.sample.tokens_T), "finished": r.sample.finished,
            "reward": r.reward, "advantage": round(r.advantage, 4), **r.notes,
        } for r in group]
        for groups in minibatches for group in groups
    ]  # fmt: skip
    if ranks > 1:
        import torch.distributed as dist

        shares: list[Any] = [None] * ranks
        dist.gather_object([[len(groups) for groups in minibatches], mine], shares if rank == 0 else None)
        if rank:
            return []
        left = [iter(groups) for _, groups in shares]
        mine = []
        for counts in zip(*(sizes for sizes, _ in shares)):  # of one minibatch: dealt out in turn
            parts = [list(itertools.islice(left[r], n)) for r, n in enumerate(counts)]
            mine += [group for turn in itertools.zip_longest(*parts) for group in turn if group]
    return [[{"id": f"{step}-{g}-{n}", "step": step, **record} for n, record in enumerate(group)] for g, group in enumerate(mine)]


def measure(groups: Sequence[Sequence[dict[str, Any]]], options: dict[str, Any]) -> dict[str, Any]:
    """What the batch says of the policy that sampled it."""
    everyone = [r for group in groups for r in group]
    rewards = [r["reward"] for r in everyone if r["reward"] is not None]
    spreads = [pstdev([r["reward"] for r in group if r["reward"] is not None] or [0.0]) for group in groups]
    return {
        "prompt_ids": [group[0]["prompt_id"] for group in groups],
        "reward": fmean(rewards) if rewards else None,
        "reward_std": fmean(spreads),
        "flat_groups": fmean(spread < max(options["std_floor"], 1e-9) for spread in spreads),
        "length": fmean(r["tokens"] for r in everyone),
        "truncated": fmean(not r["finished"] for r in everyone),
        "invalid": fmean(r.get("invalid", False) for r in everyone),
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


def save_rollouts(path: Path, groups: Sequence[Sequence[dict[str, Any]]], options: dict[str, Any]) -> None:
    """Keep the first `save_rollouts` rollouts of the step."""
    for record in [r for group in groups for r in group][: options["save_rollouts"]]:
        annotate.append_jsonl(path, record)


def show(groups: Sequence[Sequence[dict[str, Any]]], step: int) -> None:
    """Print the best and the worst rollout of the first group: look at them, not only at the curve."""
    group = sorted((r for r in groups[0] if r["reward"] is not None), key=lambda r: r["reward"])
    for name, r in (("worst", group[0]), ("best", group[-1])) if group else ():
        tqdm.write(f"  step {step}, {name} of a group, reward {r['reward']:.2f}: {' '.join(r['completion'].split())[:160]}")


# ---------------------------------------------------------------------------------------------
# The two tasks.
# ---------------------------------------------------------------------------------------------


def judge_task(run: Path, judge: dict[str, Any], start: Path | None) -> Task:
    """A judge against gold labels: eq. 1, or eq. 3 for a pairwise one."""
    pairwise = judge.get("pairwise", False)
    labels, score = (annotate.PAIRWISE_LABELS, pairwise_verifiable_reward) if pairwise else (annotate.LABELS, verifiable_reward)
    rows = sft.labelled(run, "judge_train", pairwise=pairwise)
    tokenizer, reasoning = annotate.load_tokenizer(judge["model"]), judge["reasoning"]
    rubrics = annotate.read_rubrics(run) if judge.get("rubrics") else None

    def prompt(row: dict[str, Any]) -> list[int]:
        return annotate.judge_prompt(tokenizer, annotate.row_messages(row, rubrics), reasoning)

    def reward(row: dict[str, Any], sample: Any) -> tuple[float, dict[str, Any]]:
        label = read_score(sample.text, reasoning, labels) if sample.finished else None
        return score(label, row["label"]), {"label": label, "gold": row["label"], "invalid": label is None}

    fitting = [r for r in rows if len(prompt(r)) <= judge["max_prompt"]]
    return Task(fitting or none_fit(run, judge["max_prompt"]), prompt, one_by_one(reward), start)


def policy_task(options: dict[str, Any], run: Path, judge: Any) -> Task:
    """A policy against a frozen judge: the expected score, or eq. 4 for a pairwise judge."""
    tokenizer = annotate.load_tokenizer(options["model"])
    rows = annotate.read_jsonl(run / "annotations" / "instructions.jsonl", ["id", "split", "instruction"])

    def prompt(row: dict[str, Any]) -> list[int]:
        return annotate.policy_prompt(tokenizer, row["instruction"])

    def reward(row: dict[str, Any], sample: Any) -> tuple[float | None, dict[str, Any]]:
        verdict = annotate.ask_judge(judge, row["instruction"], sample.text.strip())
        return verdict.expected, {"label": verdict.label, "thinking": verdict.thinking, "invalid": verdict.label is None}

    def wins(row: dict[str, Any], first: Any, second: Any) -> float | None:
        choice = annotate.ask_judge(judge, row["instruction"], first.text.strip(), second.text.strip()).label
        return None if choice is None else float(choice == 1)

    rewards = one_by_one(reward)
    if judge and judge.pairwise:
        rewards = against_each_other(wins, options["group"], options["opponents"], options["both_orders"])
    chosen = [r for r in rows if r["split"] == "policy_train" and len(prompt(r)) <= options["max_prompt"]]
    return Task(chosen or none_fit(run, options["max_prompt"]), prompt, rewards, None)


def none_fit(run: Path, tokens: int) -> Any:
    annotate.fail(f"{run}/annotations: no training prompt of at most --max-prompt {tokens} tokens. Raise it, or annotate more.")


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
    judge = annotate.read_json(folder / "judge.json", ("adapter", *sft.DESCRIBES))
    sft.check_adapter(folder / judge["adapter"], judge["model"], judge["lora_rank"])
    return folder, judge


def plan_steps(options: dict[str, Any], run: Path, folder: Path, judge: str | None) -> tuple[list[Any], float | None]:
    """(the calls and tokens of the steps still to come, their seconds as measured on the steps done).

    `judge`: the name of the judge to please; None where the judge itself is trained.
    """
    facts = annotate.expect(run, options["preset"])
    done = annotate.peek(folder / "metrics.jsonl", limit=options["steps"])
    left = options["steps"] - len(done)
    number = left * options["prompts"] * options["group"]
    read, written = facts["instruction"], min(facts["output"], options["max_tokens"])
    if judge is None:
        read, written = facts["judge_prompt"], min(facts["reasoning"] + 1, options["max_tokens"])
    parts = [("rollouts", number, read / options["group"], written)]  # a group's prompt is read once
    if judge is not None:
        parts += [("judgements", number, facts["judge_prompt"], 1 if "direct" in judge else facts["reasoning"] + 1)]
    parts += [("rollouts to train on", number, 0, read / options["group"] + written)]
    return parts, left * fmean(step["seconds"] for step in done) if done else None


# ---------------------------------------------------------------------------------------------
# Where everything runs: servers on their GPUs, ranks on theirs.
# ---------------------------------------------------------------------------------------------

Door = tuple[str, str, str]  # url, key, model: an annotate.Endpoint that can travel to another process


def memory_shares(places: dict[str, str], train_gpus: str) -> dict[str, float]:
    """The share of its GPUs' memory for each server of `places` (role -> GPUs).

    A server alone on a GPU takes 0.9 of it; servers that share one, equal parts. Where a rank
    trains too, half of the GPU is left to it.
    """
    users = Counter(gpu for gpus in places.values() for gpu in gpus.split(","))
    room = {gpu: (0.45 if gpu in train_gpus.split(",") else 0.9) / n for gpu, n in users.items()}
    return {role: min(room[gpu] for gpu in gpus.split(",")) for role, gpus in places.items()}


@contextlib.contextmanager
def serve_judge(options: dict[str, Any], run: Path) -> Iterator[Door]:
    """The server of a judge that is trained itself."""
    (share,) = memory_shares({"judge": options["judge_gpus"]}, options["train_gpus"]).values()
    with annotate.serve(
        options["model"], run / "logs", max_len=options["max_prompt"] + options["max_tokens"], max_loras=2 + options["overlap"],
        lora_rank=options["lora_rank"], lora_modules=options["lora_modules"], gpus=options["judge_gpus"], memory=share,
    ) as endpoint:  # fmt: skip
        yield endpoint.url, endpoint.key, endpoint.model


@contextlib.contextmanager
def serve_policy_and_judge(options: dict[str, Any], judge: dict[str, Any], adapter: Path, run: Path) -> Iterator[tuple[Door, Door, str]]:
    """(door to the policy, door to the judge, the judge's served name).

    One server with two adapters where both have the same base model, on the GPUs of both. A role
    with a URL is served elsewhere already; its server must see the run folder under the same path,
    allow adapters to be loaded, and report processed log-probabilities (see `annotate.serve`).
    """
    roles = {
        "policy": {"model": options["model"], "lora_rank": options["lora_rank"], "lora_modules": options["lora_modules"],
                   "max_len": options["max_prompt"] + options["max_tokens"], "max_loras": 1 + options["overlap"]},
        "judge": {"model": judge["model"], "lora_rank": judge["lora_rank"], "lora_modules": judge["lora_modules"],
                  "max_len": judge["max_prompt"] + judge["max_thinking"] + 16, "max_loras": 1},
    }  # fmt: skip
    urls = {role: options[f"{role}_url"] for role in roles if options[f"{role}_url"]}
    places = {role: options[f"{role}_gpus"] for role in roles if role not in urls}
    one = len(places) == 2 and judge["model"] == options["model"]
    if one:
        a, b = roles["policy"], roles["judge"]
        roles["policy"] = {
            "model": a["model"], "lora_rank": max(a["lora_rank"], b["lora_rank"]), "lora_modules": sorted({*a["lora_modules"], *b["lora_modules"]}),
            "max_len": max(a["max_len"], b["max_len"]), "max_loras": a["max_loras"] + b["max_loras"],
        }  # fmt: skip
        places = {"policy": ",".join(dict.fromkeys(f"{places['policy']},{places['judge']}".split(",")))}
    shares = memory_shares(places, options["train_gpus"])
    for role, gpus in places.items():
        print(f"{'policy and judge' if one else role}: {roles[role]['model']} on GPU {gpus}, {shares[role]:.0%} of its memory")
    print(f"training: {len(options['train_gpus'].split(','))} rank(s) on GPU {options['train_gpus']}", flush=True)
    with contextlib.ExitStack() as stack:
        doors: dict[str, Any] = {
            role: stack.enter_context(annotate.at_url(role, url, roles[role]["model"])) for role, url in urls.items()
        }
        for role, gpus in places.items():
            doors[role] = stack.enter_context(annotate.serve(logs=run / "logs", gpus=gpus, memory=shares[role], **roles[role]))
        doors.setdefault("judge", doors["policy"])
        name = f"judge-{secrets.token_hex(3)}"
        doors["judge"].load_adapter(name, adapter)
        yield *((doors[role].url, doors[role].key, doors[role].model) for role in ("policy", "judge")), name  # type: ignore[misc]


def judge_rank(options: dict[str, Any], run: Path, folder: Path, judge: dict[str, Any], start: Path | None, door: Door, lineage: str) -> None:
    """What each rank of `03_rl.py judge` does."""
    on_rank(options, folder, annotate.Endpoint(*door), lambda: judge_task(run, judge, start), lineage)


def policy_rank(
    options: dict[str, Any], run: Path, folder: Path, judge: dict[str, Any], doors: tuple[Door, Door, str], lineage: str
) -> None:
    """What each rank of `03_rl.py policy` does."""
    policy, ours, name = doors

    def task() -> Task:
        served = sft.open_judge(annotate.Endpoint(*ours), annotate.load_tokenizer(judge["model"]), name, judge, run)
        return policy_task(options, run, served)

    on_rank(options, folder, annotate.Endpoint(*policy), task, lineage)


def on_rank(options: dict[str, Any], folder: Path, endpoint: Any, task: Callable[[], Task], lineage: str) -> None:
    try:
        grpo(options, folder, endpoint, task(), lineage)
    except annotate.LostServer as error:
        print(f"rank {sft.world()[0]}: a server is lost ({error})", flush=True)
        raise SystemExit(LOST_SERVER) from None
    except annotate.ServerError as error:
        annotate.fail(str(error))


def with_servers(serving: Callable[[], contextlib.AbstractContextManager[Any]], folder: Path, train_gpus: str, rank: Callable[..., None], *arguments: Any) -> None:
    """Run `rank` on the ranks with fresh servers. Where one dies, start again, as long as steps get done between deaths."""
    reached = -1
    while True:
        with serving() as doors:
            try:
                return sft.on_ranks(rank, train_gpus, *arguments, doors, f"step-{secrets.token_hex(3)}")
            except SystemExit as end:
                step, _ = sft.latest_state(folder)
                if end.code != LOST_SERVER:
                    raise
                if step <= reached:
                    annotate.fail(f"a server died twice at step {step}: see the newest files in {folder.parent.parent / 'logs'}.")
                reached = step
        print(f"starting servers again, to go on after step {step}", flush=True)


# ---------------------------------------------------------------------------------------------
# The commands.
# ---------------------------------------------------------------------------------------------

SAMPLING = (0.05, 2.0)  # GRPO divides logits by its temperature, and needs rollouts that differ
SHARED = {
    "group": (6, 8, 8),
    "std_floor": (0.1, 0.1, 0.1),
    "clip_low": (0.2, 0.2, 0.2),
    "clip_high": (0.3, 0.3, 0.3),
    "save_every": (1, 10, 10),
    "show_every": (5, 10, 10),
    "threads": (64, 256, 1024),
    "beta": (0.0, 0.0, 0.0),
    "overlap": (False, False, False),
    "seed": (0, 0, 0),
}
JUDGE = {
    **SHARED,
    "judge_gpus": ("0", "0", "0,1,2,3,4,5"),
    "train_gpus": ("0", "0", "6,7"),
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
    "opponents": (0, 0, 0),
    "both_orders": (False, False, False),
    "policy_gpus": ("0", "0", "0,1"),
    "judge_gpus": ("0", "0", "2,3,4,5"),
    "train_gpus": ("0", "0", "6,7"),
    "policy_url": ("", "", ""),
    "judge_url": ("", "", ""),
    "model": (annotate.LAPTOP_MODEL, "Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    "lora_rank": (16, 32, 64),
    "lora_modules": (sft.ATTENTION, sft.LINEAR, sft.LINEAR),
    "steps": (12, 300, 1200),
    "prompts": (4, 32, 128),
    "minibatches": (2, 4, 4),
    "lr": (1e-3, 2e-5, 2e-5),
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
    "opponents": "Against a pairwise judge: others of its group that a rollout is compared with, an even number; 0: all, G (G - 1) / 2 calls a prompt. Paper: all.",
    "both_orders": "Against a pairwise judge: ask about each pair in both orders, at twice the calls. Paper: silent.",
    "overlap": "Sample the next batch while this one trains: it comes from an adapter one step old, which eq. 2's ratio corrects for. For GPUs of their own: on shared CPU cores a step takes many times as long.",
    "policy_gpus": "GPUs of the policy's servers, one replica on each (on a CPU: how many).",
    "judge_gpus": "GPUs of the judge's servers, one replica on each (on a CPU: how many).",
    "train_gpus": "GPUs that train, one rank on each (on a CPU: how many ranks). May be the servers' own. Paper: 32 A100 + 32 for the judge.",
    "policy_url": "Ask a policy server that runs already (…/v1; key in POLICY_API_KEY) instead of starting one.",
    "judge_url": "Ask a judge server that runs already (…/v1; key in JUDGE_API_KEY) instead of starting one.",
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


class Start(StrEnum):
    sft = "sft"
    base = "base"


def judge_option(name: str) -> Any:
    return annotate.option(JUDGE, name, HELP[name])


def policy_option(name: str) -> Any:
    return annotate.option(POLICY, name, HELP[name])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0])


@app.command("judge")
def train_judge(
    run: Path = annotate.RUN,
    preset: annotate.Preset | None = annotate.PRESET,  # type: ignore[name-defined]
    judge: str = typer.Option("reasoning", help="The judge of stage 2 to go on with: reasoning, direct, or a --name of 02."),
    start: Start = typer.Option(Start.sft, "--from", help="sft: go on from stage 2. base: RL only, from the untrained base model (paper, section 4.1)."),
    name: str = typer.Option("", help="Name of the new judge's folder, RUN/judges/NAME-rl. Default: the judge's, JUDGE-base with --from base."),
    steps: int | None = judge_option("steps"),
    prompts: int | None = judge_option("prompts"),
    group: int | None = judge_option("group"),
    minibatches: int | None = judge_option("minibatches"),
    lr: float | None = judge_option("lr"),
    beta: float | None = judge_option("beta"),
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
    overlap: bool | None = judge_option("overlap"),
    judge_gpus: str | None = judge_option("judge_gpus"),
    train_gpus: str | None = judge_option("train_gpus"),
    seed: int | None = judge_option("seed"),
    plan: bool = annotate.PLAN,
    tokens_per_second: float | None = annotate.RATE,
) -> None:
    """Train a judge on gold labels (eq. 1)."""
    options = annotate.settle(JUDGE, run, preset, dict(locals()), temperature=SAMPLING)
    judge = judge.removesuffix("-sft")
    folder = run / "judges" / f"{name or (f'{judge}-base' if start == Start.base else judge)}-rl"
    if plan:
        parts, seconds = plan_steps(options, run, folder, None)
        return annotate.show_plan(parts, options["preset"], tokens_per_second, seconds)
    if start == Start.base:
        described = {**annotate.settle(sft.PRESETS, run, preset, {}), "reasoning": "direct" not in judge}
        described = {key: described[key] for key in sft.DESCRIBES} | {"max_thinking": options["max_tokens"], "pairwise": "pairwise" in judge}
        adapter, origin = None, "base"
    else:
        source, described = find_judge(run, f"{judge}-sft")
        adapter, origin = source / described["adapter"], source.name
    if described.get("pairwise") and max_tokens is None:  # two outputs are reasoned about
        options["max_tokens"] = max(options["max_tokens"], described["max_thinking"])
    options |= {**{key: described[key] for key in ("model", "lora_rank", "lora_modules", "max_prompt")}, "judge": origin}
    annotate.record_config(folder, options)
    if not (folder / "judge.json").exists():
        annotate.need_gpus(options)
        judge_task(run, described, adapter)  # bad data end the command here, before servers start
        serving = partial(serve_judge, options, run)
        with_servers(serving, folder, options["train_gpus"], judge_rank, options, run, folder, described, adapter)
        last = f"checkpoints/step-{options['steps']:06d}"
        annotate.write_json(folder / "judge.json", {**described, "adapter": last, "steps": options["steps"]})
    report(folder)


@app.command("policy")
def train_policy(
    run: Path = annotate.RUN,
    preset: annotate.Preset | None = annotate.PRESET,  # type: ignore[name-defined]
    judge: str = typer.Option(..., help="The judge to please: direct or reasoning (its RL-trained form, if there is one), or a folder's name in RUN/judges."),
    name: str = typer.Option("", help="Name of the policy's folder, RUN/policies/NAME. Default: the judge's."),
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
    opponents: int | None = policy_option("opponents"),
    both_orders: bool | None = policy_option("both_orders"),
    overlap: bool | None = policy_option("overlap"),
    policy_gpus: str | None = policy_option("policy_gpus"),
    judge_gpus: str | None = policy_option("judge_gpus"),
    train_gpus: str | None = policy_option("train_gpus"),
    policy_url: str | None = policy_option("policy_url"),
    judge_url: str | None = policy_option("judge_url"),
    seed: int | None = policy_option("seed"),
    plan: bool = annotate.PLAN,
    tokens_per_second: float | None = annotate.RATE,
) -> None:  # fmt: skip
    """Train a policy against a judge (its expected score)."""
    options = annotate.settle(POLICY, run, preset, {**locals(), "lora_modules": lora_modules or None}, temperature=SAMPLING)
    folder = run / "policies" / (name or judge)
    if plan:
        parts, seconds = plan_steps(options, run, folder, judge)
        return annotate.show_plan(parts, options["preset"], tokens_per_second, seconds)
    judge_folder, trained = find_judge(run, judge)
    options["judge"] = judge_folder.name
    calls = options["group"]
    if trained.get("pairwise"):
        if options["opponents"] % 2:
            annotate.fail(f"--opponents {options['opponents']}: must be even, half of them on each side in the circle.")
        calls = calls * min(options["opponents"] or calls - 1, calls - 1) // 2 * (1 + options["both_orders"])
    print(f"judge: {judge_folder}; {options['prompts'] * calls} judgements a step")
    annotate.record_config(folder, options)
    if not (folder / "policy.json").exists():
        annotate.need_gpus(options)
        policy_task(options, run, None)  # bad data end the command here, before servers start
        serving = partial(serve_policy_and_judge, options, trained, judge_folder / trained["adapter"], run)
        with_servers(serving, folder, options["train_gpus"], policy_rank, options, run, folder, trained)
        annotate.write_json(folder / "policy.json", {key: options[key] for key in options if key in POLICY or key == "judge"})
    report(folder)


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
    annotate.start(app)
