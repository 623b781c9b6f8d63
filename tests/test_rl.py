"""Stage 3 without a live model: rewards, advantages, the loss, a whole update, the loop, several ranks."""

import contextlib
import inspect
import json
import math
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import annotate, rl, sft, two_ranks
from test_annotate import ASKED
from test_train_judge import random_llama, random_pairs, reference_logprobs, write_run
from typer.testing import CliRunner


def test_reading_a_whole_judgement() -> None:
    """The digit stands right after the first end of the thinking, and alone."""
    assert rl.read_score("thought\n</think>\n\n7", True) == 7 == rl.read_score("7", False)
    assert rl.read_score("</think>\n\n2", True, "12") == 2
    for ending in ("12", "7 good", "٧", "", "-1", "7</think>\n\n9", " 7", "7 ", "7\n"):
        assert rl.read_score(f"a</think>\n\n{ending}", True) is rl.read_score(ending, False) is None
    for text, labels in (("7", "7"), ("a</think>\n7", "7"), ("", "7"), ("</think>\n\n3", "12")):
        assert rl.read_score(text, True, labels) is None


def test_advantages() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0, 3.0])
    expected = (rewards - rewards.mean()) / rewards.std(correction=0)
    assert rl.group_advantages(rewards.tolist(), 0.1) == pytest.approx(expected.tolist())
    assert rl.group_advantages(rewards.tolist(), 0.1, scale=False) == (rewards - rewards.mean()).tolist()
    assert rl.group_advantages([6.00, 6.02], 0.1) == pytest.approx([-0.1, 0.1]), "the floor is in points"
    assert rl.group_advantages([4.0, None, 4.0], 0.0) == [0, 0, 0]


@pytest.mark.parametrize("preset", rl.JUDGE_PRESETS)
def test_a_missed_claim_is_not_lost_under_a_judges_floor(preset: str) -> None:
    """An error of two points costs 4/81 in eq. 1: a group that differs by nothing else counts in full."""
    rewards = [rl.verifiable_reward(score, 8) for score in (8, 6)]
    advantages = rl.group_advantages(rewards, rl.JUDGE_PRESETS[preset]["std_floor"])
    assert advantages == pytest.approx([1, -1])


def test_pointwise_rewards_stay_with_their_rollouts() -> None:
    """Whatever the order in which judgements finish; an invalid one gives no reward, and its cause."""

    def ask(instruction: str, output: str) -> dict[str, Any]:
        time.sleep(0.03 * (3 - int(output)))  # the first to be asked is the last to finish
        cause = "cut off" if output == "2" else None
        return {"label": 1, "expected": None if cause else float(output), "cause": cause}

    with ThreadPoolExecutor(4) as pool:
        samples = [SimpleNamespace(text=f" {n}\n") for n in range(4)]
        rewards, notes = rl.pointwise_rewards(ask, {"instruction": "x"}, samples, pool)
    assert rewards == [0, 1, None, 3] and [n["cause"] for n in notes] == [None, None, "cut off", None]


def test_a_step_whose_judgements_all_fail_ends_the_command(capsys: Any) -> None:
    """Fault F1 under `--judge gold`: with its reason, before training on nothing."""
    sample = annotate.Sample([1], [0.0], "x", True)
    server = SimpleNamespace(sample=lambda prompt, n, adapter, **_: [sample] * n)
    options = {**OPTIONS, "threads": 2, "group": 2, "max_tokens": 1}

    def collect(*causes: str | None) -> Any:
        left = iter(causes)
        ask = lambda *_: {"expected": None, "cause": next(left)}  # noqa: E731
        task = rl.Task([], lambda row: [1], partial(rl.pointwise_rewards, ask))
        return rl.collect(server, "a", task, [[{"instruction": "i"}]], options)

    ((group,),) = collect("no answer: cut", "not a label")
    assert [r.reward for r in group] == [None, None]
    with pytest.raises(SystemExit):
        collect("no answer: cut", "refused (400): no")
    assert "all 2 judgements of this step failed" in capsys.readouterr().err


def games(strengths: list[float], opponents: int = 0, answer: Any = None) -> tuple[Any, Any, Any]:
    """(rewards, notes, games played) of eq. 4, the stronger of two rollouts winning, or as `answer` says."""
    played: list[Any] = []

    def ask(instruction: str, first: str, second: str) -> dict[str, Any]:
        played.append((float(first), float(second)))
        expected = answer(*played[-1]) if answer else 1.3 if float(first) > float(second) else 1.8
        return {"expected": expected, "cause": None if expected else "cut off"}

    with ThreadPoolExecutor(1) as pool:
        row, samples = {"instruction": "x"}, [SimpleNamespace(text=str(s)) for s in strengths]
        return *rl.pairwise_rewards(ask, opponents, row, samples, pool), played


def test_equation_4() -> None:
    """The share of the other G - 1 that this one beats; a pair comes once, in random order; a tie is half."""
    strengths = [3.0, 9.0, 1.0, 7.0, 5.0]
    rewards, _, played = games(strengths)
    assert rewards == pytest.approx([sum(mine > other for other in strengths) / 4 for mine in strengths])
    assert len({frozenset(game) for game in played}) == len(played) == 10
    assert games(strengths, answer=lambda a, b: 1.5)[0] == [0.5] * 5, "fault 12"
    firsts = Counter(games([1.0, 2.0])[2][0] for _ in range(200))
    assert 60 < firsts[1.0, 2.0] < 140
    rewards, notes, _ = games([1.0, 2.0, 3.0], answer=lambda a, b: None if 3.0 in (a, b) else 1 + (a < b))
    assert rewards == [0, 1, None] and [note["cause"] is None for note in notes] == [True, True, False]


@pytest.mark.parametrize(("group", "opponents"), [(8, 2), (8, 4), (8, 6), (5, 2), (6, 0)])
def test_fewer_opponents_cost_less(group: int, opponents: int) -> None:
    """Each meets exactly `opponents` others, so calls grow with G, not G^2."""
    met = Counter(player for game in games([float(n) for n in range(group)], opponents)[2] for player in game)
    assert set(met.values()) == {opponents or group - 1} and len(met) == group


def reference_loss(new: Any, old: Any, advantages: list[float], clip: Any, beta: float, ref: Any) -> Any:
    """Eq. 2 as it stands in the paper, token by token, for a list of rollouts."""
    total = torch.zeros((), dtype=torch.float64)
    for i, advantage in enumerate(advantages):
        inner = torch.zeros((), dtype=torch.float64)
        for t in range(len(new[i])):
            rho = torch.exp(new[i][t] - old[i][t])
            clipped = torch.clip(rho, 1 - clip[0], 1 + clip[1])
            log_r = ref[i][t] - new[i][t]
            inner = inner + torch.min(rho * advantage, clipped * advantage)
            inner = inner - beta * (torch.exp(log_r) - log_r - 1)
        total = total + inner / len(new[i])
    return -total / len(advantages)


OPTIONS = {
    **{"temperature": 0.7, "clip_low": 0.2, "clip_high": 0.3, "beta": 0.0, "tokens_per_pass": 60, "lr": 0.1},
    **{"std_floor": 0.1, "scale_std": True, "token_mean": False, "old_logprobs": "sampler"},
}


def rollouts(seed: int) -> list[list[Any]]:
    """Three groups of four; one group flat, one rollout without reward."""
    rng, pairs, groups = random.Random(seed), random_pairs(seed), []
    for start in range(0, len(pairs), 4):
        drawn, group = [rng.uniform(0, 9) for _ in range(3)], []
        rewards = [5.0] * 4 if start == 4 else [*drawn, None if start else 1.0]
        for (prompt, tokens), r, a in zip(pairs[start:], rewards, rl.group_advantages(rewards, 0.1)):
            sample = annotate.Sample(tokens, [math.log(rng.uniform(0.004, 0.04)) for _ in tokens], "", True)
            group.append(rl.Rollout({"id": "x"}, prompt, sample, r, a, {}, sample.logprobs_T))
        groups.append(group)
    return groups


class Peft(torch.nn.Module):
    """What `update` needs of a peft model; without its adapter it is `other`, the reference of the KL."""

    def __init__(self, base: Any, other: Any = None) -> None:
        super().__init__()
        self.base, self.other = base, other

    def get_base_model(self) -> Any:
        return self.base

    @contextlib.contextmanager
    def disable_adapter(self) -> Any:
        self.base, kept = self.other, self.base
        yield
        self.base = kept


class Spy(torch.optim.SGD):
    """Keeps the gradient that it is handed."""

    def step(self, closure: Any = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("budget", "token_mean", "beta"),
    [(1, False, 0.0), (30, False, 0.0), (10_000, False, 0.0), (30, True, 0.0), (30, False, 0.2)],
)
def test_update_is_the_gradient_of_eq_2(budget: int, token_mean: bool, beta: float, monkeypatch: Any) -> None:
    """Against the reference on unpacked sequences, whatever the packing. `token_mean`: the mean of DAPO."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(1.0))
    model, other, groups = random_llama(), random_llama(), rollouts(seed=3)
    torch.nn.init.normal_(other.lm_head.weight, std=0.3)
    rewarded = [r for group in groups for r in group if r.reward is not None]
    assert len(rewarded) == 11 and any(r.advantage == 0 for r in rewarded)
    pairs = [(r.prompt, r.sample.tokens_T) for r in rewarded]
    new, ref = ([reference_logprobs(m, *pair, 0.7) for pair in pairs] for m in (model, other))
    old = [torch.tensor(r.sample.logprobs_T, dtype=torch.float64) for r in rewarded]
    sizes = [len(r.sample.tokens_T) for r in rewarded]
    scale = [11 * size / sum(sizes) if token_mean else 1 for size in sizes]
    advantages = [r.advantage * factor for r, factor in zip(rewarded, scale)]
    reference_loss(new, old, advantages, (0.2, 0.3), beta, [r.detach() for r in ref]).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    spy, how = Spy(model.parameters(), lr=0.1), {"tokens_per_pass": budget, "token_mean": token_mean}
    stats = rl.update(Peft(model, other), spy, groups, {**OPTIONS, **how, "beta": beta})
    largest = max(g.abs().max().item() for g in expected)
    assert largest > 1e-3 and (stats["kl"] > 0) == (beta > 0)
    for mine, theirs in zip(spy.seen, expected):
        assert torch.allclose(mine, theirs, atol=1e-5 * largest)


def test_a_server_with_other_weights_ends_the_training(tmp_path: Path, capsys: Any) -> None:
    """Before any update trainer and sampler must agree, but for rounding."""
    model, other, groups = random_llama(), random_llama(), rollouts(seed=3)
    torch.nn.init.normal_(other.lm_head.weight, std=0.3)
    for r in (r for group in groups for r in group):
        r.sample.logprobs_T = r.old_T = reference_logprobs(model, r.prompt, r.sample.tokens_T, 0.7).tolist()
    spy = Spy(model.parameters(), lr=0.1)
    stats = rl.update(Peft(model), spy, groups, OPTIONS)
    assert stats["logprob_gap"] < 1e-5 and stats["ratio"] == pytest.approx(1, abs=1e-5)
    rl.keep_step(tmp_path, 1, [], stats)
    stats = rl.update(Peft(other), Spy(other.parameters(), lr=0.1), groups, OPTIONS)
    with pytest.raises(SystemExit):
        rl.keep_step(tmp_path, 2, [], stats)
    assert "the server has other weights" in capsys.readouterr().err
    assert [record["step"] for record in annotate.read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_whose_log_probabilities_are_old(monkeypatch: Any) -> None:
    """Eq. 2 with the trainer's own: the ratio is 1 before an update, whatever the sampler said.

    The gradient is that of the reference with these as old ones, in the second minibatch too.
    """
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(1.0))
    model, batch = random_llama(), [rollouts(seed=3), rollouts(seed=4)]
    rl.recompute_old_logprobs(Peft(model), batch, {**OPTIONS, "tokens_per_pass": 30})
    everything = [r for groups in batch for group in groups for r in group]
    for r in everything:
        own_T = reference_logprobs(model, r.prompt, r.sample.tokens_T, 0.7)
        assert torch.allclose(torch.tensor(r.old_T).double(), own_T, atol=1e-5)
    first = rl.update(Peft(model), torch.optim.SGD(model.parameters(), lr=0.3), batch[0], OPTIONS)
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["logprob_gap"] > 0.1
    rewarded = [r for group in batch[1] for r in group if r.reward is not None]
    new = [reference_logprobs(model, r.prompt, r.sample.tokens_T, 0.7) for r in rewarded]
    old = [torch.tensor(r.old_T).double() for r in rewarded]
    reference_loss(new, old, [r.advantage for r in rewarded], (0.2, 0.3), 0, new).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    spy = Spy(model.parameters(), lr=0.1)
    second = rl.update(Peft(model), spy, batch[1], OPTIONS)
    assert abs(second["ratio"] - 1) > 1e-3 and second["clipped_low"] + second["clipped_high"] > 0
    for mine, theirs in zip(spy.seen, expected):
        assert torch.allclose(mine, theirs, atol=1e-5 * max(g.abs().max().item() for g in expected))


def updates(folder: Path) -> None:
    """Two optimiser steps on this rank's share of three groups; what it saw goes to a file."""
    torch.nn.utils.clip_grad_norm_ = lambda parameters, limit: torch.tensor(1.0)  # the sum itself is wanted
    model, (rank, ranks), found = random_llama(), sft.rank_and_size(), []
    for share in (rollouts(seed=3)[rank::ranks], [] if rank else rollouts(seed=3)):
        spy = Spy(model.parameters(), lr=0.1)
        found.append((rl.update(Peft(model), spy, share, OPTIONS), spy.seen))
    torch.save(found, folder / f"{ranks}-{rank}.pt")


@two_ranks
def test_ranks_take_the_same_step(tmp_path: Path, monkeypatch: Any) -> None:
    """Groups of different weight, one of them flat, dealt to two ranks; then none at all for the second."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", None)
    updates(tmp_path)
    sft.on_ranks(updates, "0,1", tmp_path)
    alone, *ranks = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for (stats, gradients), (same, got) in [pair for rank in ranks for pair in zip(alone, rank)]:
        assert same == pytest.approx(stats), "every rank knows the statistics of the whole step"
        for mine, theirs in zip(got, gradients):
            assert torch.allclose(mine, theirs, atol=1e-5 * max(g.abs().max().item() for g in gradients))


class Sampler:
    """Answers from a fixed table, by prompt. Ranks share `loaded`, the adapters that are served."""

    def __init__(self, loaded: Path) -> None:
        self.loaded, self.asked = loaded, []
        loaded.mkdir(exist_ok=True)

    def load_adapter(self, name: str, path: Path) -> None:
        assert (path / "adapter_model.safetensors").exists()
        (self.loaded / name).touch(exist_ok=False)

    def unload_adapter(self, name: str) -> None:
        (self.loaded / name).unlink()

    def sample(self, prompt: list[int], n: int, model: str, **_: Any) -> Any:
        assert (self.loaded / model).exists(), "sampled from an adapter that is not served any more"
        self.asked.append((model, prompt[-1]))
        tokens = [[(7 * prompt[-1] + 3 * k + i) % 90 for i in range(1 + k % 3)] for k in range(n)]
        return [annotate.Sample(t, [-4.5] * len(t), f"{k}", True) for k, t in enumerate(tokens)]


LOOP = {"lora_rank": 8, "lora_modules": ["q_proj"], "seed": 0, "threads": 8, "max_tokens": 4}
LOOP |= {"checkpointing": False}
LOOP |= {**OPTIONS, "lr": 1e-3, "prompts": 3, "group": 3, "minibatches": 2, "checkpoint_every": 2}


def loop(folder: Path, options: dict[str, Any]) -> None:
    rl.fail = lambda message: None  # the stand-in's log-probabilities are not the model's
    rows = [{"id": str(n), "instruction": "x"} for n in range(5)]
    update, minibatches, sampler = rl.update, [], Sampler(folder / "loaded")

    def rewards(row: Any, samples_G: Any, pool: Any) -> Any:
        rewards_G = [float(s.text) if row["id"] != "4" else None for s in samples_G]
        return rewards_G, [{"cause": None} for _ in rewards_G]

    def recorded(model: Any, optimizer: Any, groups: Any, *more: Any) -> Any:
        minibatches.append([int(group[0].row["id"]) for group in groups])
        return update(model, optimizer, groups, *more)

    rl.update = recorded
    rl.grpo(options, folder, sampler, rl.Task(rows, lambda row: [1, 2, int(row["id"])], rewards))
    rl.update = update
    name = f"asked-{sft.rank_and_size()[0]}-{options['steps']}.json"
    annotate.write_json(folder / name, [sampler.asked, minibatches])


@pytest.mark.parametrize("gpus", ["0", pytest.param("0,1", marks=two_ranks)])
def test_the_loop(tmp_path: Path, gpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step samples from the adapter of that step; ranks split each minibatch; a resumed run is whole."""
    monkeypatch.setattr(rl, "fail", None)
    options = {**LOOP, "model": write_run(tmp_path)["model"]}
    for steps in (2, 3):  # the second call goes on, with a new server
        sft.on_ranks(loop, gpus, tmp_path, {**options, "steps": steps})
        for path in (tmp_path / "loaded").iterdir():
            path.unlink()
    metrics = annotate.read_jsonl(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2] and all(m["rollouts"] == 9 for m in metrics)
    wanted = [rl.prompts_of_step(range(5), step, 3, 0) for step in range(3)]
    for step, numbers in enumerate(wanted):
        found = [json.loads(p.read_text()) for p in tmp_path.glob(f"asked-*-{max(2, step + 1)}.json")]
        asked = [number for pairs, _ in found for model, number in pairs if model == f"step-{step:06d}"]
        assert sorted(map(int, metrics[step]["prompt_ids"])) == sorted(asked) == sorted(numbers)
        parts = [minibatches[2 * (step % 2) :][:2] for _, minibatches in found]  # two a step
        assert [sorted(chain(*part)) for part in zip(*parts)] == [sorted(numbers[:2]), numbers[2:]]
    records = annotate.read_jsonl(tmp_path / "rollouts.jsonl")
    assert len({r["id"] for r in records}) == len(records) == 27
    for n in wanted[0]:
        group = [r for r in records if r["step"] == 0 and r["prompt_id"] == str(n)]
        rewards = [None if n == 4 else float(r["completion"]) for r in group]
        assert [r["reward"] for r in group] == rewards and len(group) == 3
        advantages = rl.group_advantages(rewards, 0.1)
        assert [r["advantage"] for r in group] == pytest.approx(advantages, abs=1e-4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert sft.latest_state(tmp_path)[0] == 3


def test_a_prompt_that_comes_twice_in_a_step_makes_two_groups(tmp_path: Path, monkeypatch: Any) -> None:
    """Where a step has more prompts than there are; and fault R11: without an update there is no gap."""
    monkeypatch.setattr(rl, "fail", None)
    options = {**LOOP, "model": write_run(tmp_path)["model"], "prompts": 10, "steps": 1, "group": 2}
    loop(tmp_path, options)
    records = annotate.read_jsonl(tmp_path / "rollouts.jsonl")
    assert len({r["id"] for r in records}) == len(records) == 20
    flat = [{**r, "reward": 5.0, "advantage": 0.0} for r in records]
    measured = rl.measure(flat, [{"tokens": 0}], options)
    assert (measured["logprob_gap"], measured["zero_variance_groups"]) == (None, 1)
    assert measured["rollouts"] == 20 == 2 * len(measured["prompt_ids"])


def test_where_rl_begins(tmp_path: Path, monkeypatch: Any) -> None:
    """Fault R5: --from base has the model of that judge. Fault 9: a judge has no KL term."""
    model, found = write_run(tmp_path)["model"], []
    lora = {"lora_rank": 8, "lora_modules": ["q_proj"]}
    settings = {**lora, "model": model, "seed": 0, "lr": 1.0, "checkpointing": False}
    trained, _ = sft.load_training(settings, None)
    sft.save_adapter(trained, tmp_path / "judges/mine-sft/epoch-1")
    limits = {"max_thinking": 50, "temperature": 0.5, "max_prompt": 300}
    judge = {**lora, **limits, "model": model, "reasoning": True, "adapter": "epoch-1", "effort": "low"}
    annotate.write_json(tmp_path / "judges/mine-sft/judge.json", judge)
    monkeypatch.setattr(rl, "train", lambda *arguments: found.append(arguments))

    def asked_for(line: str) -> tuple[Any, ...]:
        found.clear()
        result = CliRunner().invoke(rl.app, f"{line} --run {tmp_path}".split())
        return found[0] if found else result.stderr

    options, _, folder, *_, adapter = asked_for("policy --judge mine")
    assert adapter.name == "epoch-1" and (options["judge"], folder.name) == ("mine-sft", "mine")
    options, _, folder, *_ = asked_for("judge --judge mine")
    assert options["start_adapter"] == "judges/mine-sft/epoch-1" and folder.name == "mine-rl"
    assert (options["model"], options["max_tokens"], options["beta"]) == (model, 50, 0)
    assert "mine-rl" in asked_for("policy --judge mine --name two"), "begun and not finished: which is meant?"
    options, _, folder, record, *_ = asked_for("judge --judge mine --from base")
    assert (options["start_adapter"], options["model"], record["effort"]) == ("", model, "low")
    assert folder.name == "mine-base-rl" and record["lora_rank"] == 8
    assert "typo-sft" in asked_for("judge --judge typo --from base")
    annotate.write_json(tmp_path / "annotations/config.json", {"options": {"preset": "gpu"}})
    options, *_ = asked_for("judge --judge mine --name large")
    wanted = {"steps": 100, "prompts": 64, "group": 8, "lr": 2e-5, "max_tokens": 50}
    assert {key: options[key] for key in wanted} == wanted
    assert "beta" not in inspect.signature(rl.train_judge).parameters


def test_a_run_may_be_moved(tmp_path: Path, monkeypatch: Any) -> None:
    """F20: by another path, or renamed, it goes on; RL begins with the adapter that lies in it now."""
    options, found = write_run(tmp_path / "run"), []
    limits = {"max_thinking": 50, "temperature": 0.5, "max_prompt": 300, "reasoning": False}
    judge = {**limits, "lora_rank": 8, "lora_modules": ["q_proj"], "model": options["model"]}
    annotate.write_json(tmp_path / "run/judges/mine-sft/judge.json", {**judge, "adapter": "epoch-1"})
    adapter = {"base_model_name_or_path": options["model"], "r": 8}
    annotate.write_json(tmp_path / "run/judges/mine-sft/epoch-1/adapter_config.json", adapter)
    annotate.write_text(tmp_path / "run/judges/mine-sft/epoch-1/adapter_model.safetensors", "")
    monkeypatch.setattr(rl, "train", lambda options, run, *_: found.append(rl.judge_task(options, run).start))
    for name in ("run", "renamed"):
        if name == "renamed":
            (tmp_path / "run/judges/mine-rl/metrics.jsonl").touch()  # work has begun
            (tmp_path / "run").rename(tmp_path / name)
            (tmp_path / "run").symlink_to(tmp_path / name)  # where the base model was
        result = CliRunner().invoke(rl.app, ["judge", "--judge", "mine", "--run", str(tmp_path / name)])
        assert len(found) == 1 + (name == "renamed"), result.output
        annotate.LOCKS.pop().release()  # as the end of a process does
    assert found == [tmp_path / name / "judges/mine-sft/epoch-1" for name in ("run", "renamed")]


SHARES = {"0 0 0": [0.225] * 2, "0 0 0 same": [0.45], "0,1 2,3 4": [0.9] * 2, "0 2 2": [0.9, 0.45]}


@pytest.mark.parametrize("gpus", SHARES)
def test_servers_and_ranks_share_the_memory(tmp_path: Path, gpus: str, monkeypatch: Any) -> None:
    """Of policy, judge and ranks; one server plays both where they have the same base model."""
    found: list[Any] = []

    @contextlib.contextmanager
    def serve(model: str, logs: Path, room: int, gpus: str, memory: float, **lora: Any) -> Any:
        found.append(memory)
        yield SimpleNamespace(url="u", key="k", model="m", load_adapter=lambda *_: None)

    monkeypatch.setattr(annotate, "serve", serve)
    monkeypatch.setattr(annotate, "context_length", lambda _: 99)
    monkeypatch.setattr(sft, "on_ranks", lambda *_: None)
    monkeypatch.setattr(rl, "rows_and_prompt", lambda *_: ([{"id": "a"}], lambda row: [1]))
    options = dict(zip(("policy_gpus", "judge_gpus", "train_gpus"), gpus.split()))
    options |= {"task": "policy", "model": "m", "max_prompt": 9, "lora_rank": 8, "lora_modules": ["q_proj"]}
    options["judge_record"] = {**options, "model": "m" if "same" in gpus else "other"}
    rl.train(options, tmp_path, tmp_path, {}, options["policy_gpus"], tmp_path)
    assert found == pytest.approx(SHARES[gpus])


def test_the_controls_are_trained_on_gold_or_truth_itself(tmp_path: Path) -> None:
    gold, output = {"gold": "oracle", "gold_effort": "none"}, "This sentence is about the soft rain."
    annotate.write_json(tmp_path / "annotations/config.json", {"options": gold})
    for judge, score in (("gold", 9), ("truth", annotate.truth(ASKED, output))):
        options = {"judge": judge, "judge_record": None, "task": "policy"}
        ask = rl.judge_to_please(options, tmp_path, None)
        assert ask(ASKED, output)["expected"] == score < 9 or judge == "gold"
