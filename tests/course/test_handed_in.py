"""What students hand in from runs: tests/course/PROBLEMS.md says what belongs into handin/PROBLEM/.

Where numbers can be computed again, they are: metrics from the rollouts, gold and truth from the outputs, the
order of prompts from the seed. `tests/course.py grade` sets COURSE_HANDIN, COURSE_RUN (the shipped run) and
COURSE_SEED; without them these tests are skipped.
"""

import json
import math
import os
import random
import re
import shutil
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import pytest
from conftest import ROOT, annotate, rl, sft

Row = dict[str, Any]
GROUP = 6
LEAST = 30  # instructions behind a mean


@pytest.fixture
def handin(request: Any) -> Path:
    if "COURSE_HANDIN" not in os.environ:
        pytest.skip("nothing is handed in: python tests/course.py grade")
    return Path(os.environ["COURSE_HANDIN"]) / request.function.__name__.removeprefix("test_")


def read(path: Path) -> Any:
    """The content of a file that must be there, JSON or JSONL."""
    assert path.exists(), f"{path.parent.name}/{path.name} was not handed in"
    return annotate.read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text("utf-8"))


def shipped(name: str) -> Any:
    return read(Path(os.environ["COURSE_RUN"]) / name)


# --- Predict, then run ------------------------------------------------------------------------------


def groups_of(rows: list[Row]) -> list[list[Row]]:
    return [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)]


def std(group: list[Row]) -> float:
    return pstdev(row["reward"] for row in group)


def run_of(folder: Path, **wanted: Any) -> tuple[Row, list[Row], list[Row]]:
    """(options, metrics, rollouts) of a policy's run with the options `wanted`; they must fit each other."""
    where = f"{folder.parent.name}/{folder.name}"
    assert (folder.parent / "prediction.md").exists(), (
        "prediction.md, which you write before you run anything"
    )
    options = read(folder / "config.json")["options"]
    metrics, rollouts = read(folder / "metrics.jsonl"), read(folder / "rollouts.jsonl")
    for key, value in {"task": "policy", "prompts": 5, "group": GROUP, **wanted}.items():
        assert options[key] == value, f"{where}: the option {key} is {options[key]!r}, not {value!r}"
    if seed := os.environ.get("COURSE_SEED"):
        assert options["seed"] == int(seed), f"{where}: the seed is {options['seed']}, yours is {seed}"
    assert [m["step"] for m in metrics] == list(range(options["steps"])), f"{where}: steps are missing"
    rows = [row for row in shipped("annotations/instructions.jsonl") if row["split"] == "policy_train"]
    for m in metrics:
        of_step = [r for r in rollouts if r["step"] == m["step"]]
        asked = [row["id"] for row in rl.prompts_of_step(rows, m["step"], 5, options["seed"])]
        assert m["prompt_ids"] == asked == [g[0]["prompt_id"] for g in groups_of(of_step)], (
            f"{where}: the prompts of step {m['step']} are not those of this seed"
        )
        assert len({r["completion"] for r in of_step}) > 1, f"{where}: all rollouts are the same"
        known = [r["reward"] for r in of_step if r["reward"] is not None]
        means = {"reward": fmean(known), "length": fmean(r["tokens"] for r in of_step)}
        means |= {"truncated": fmean(not r["finished"] for r in of_step)}
        for key, value in means.items():
            assert m[key] == pytest.approx(value, abs=1e-6), f"{where}: {key} is not that of rollouts.jsonl"
        for group in groups_of(of_step):
            rewards = [r["reward"] for r in group]
            again = rl.group_advantages(rewards, options["std_floor"], options["scale_std"])
            assert [r["advantage"] for r in group] == pytest.approx(again, abs=1e-4), f"{where}: advantages"
    return options, metrics, rollouts


def same_but(one: Row, two: Row, *names: str) -> None:
    """The two runs compare nothing else than the options `names`."""
    free = {*names, "name", "steps", "checkpoint_every", "threads", "tokens_per_pass"}
    other = [key for key in one.keys() | two.keys() if key not in free and one.get(key) != two.get(key)]
    assert not other, f"the two runs also differ in {', '.join(other)}"


def answered(folder: Path, **truths: float) -> None:
    """answer.json has these numbers, to 2 %."""
    answer = read(folder / "answer.json")
    for key, value in truths.items():
        assert answer.get(key) == pytest.approx(value, rel=0.02, abs=1e-4), f"answer.json, {key!r}: not right"


def test_ratio(handin: Path) -> None:
    """With one minibatch the policy has not moved since it sampled: ratio 1, and nothing to clip."""
    one, ones, _ = run_of(handin / "one", minibatches=1, old_logprobs="sampler")
    several, others, _ = run_of(handin / "several", old_logprobs="sampler")
    same_but(one, several, "minibatches")
    assert several["minibatches"] > 1 and min(one["steps"], several["steps"]) >= 4
    for m in (*ones, *others):  # of a step's first minibatch
        assert m["ratio"] == pytest.approx(1, abs=0.01), f"the ratio in step {m['step']}"
    assert all(m["clipped_low"] == m["clipped_high"] == 0 for m in ones), "clipped, with one minibatch?"
    assert any(m["clipped_low"] + m["clipped_high"] > 0 for m in others), "never clipped: raise --minibatches"


def test_floor(handin: Path) -> None:
    """Without a floor, groups whose rewards differ by a hair push as hard as any other."""
    options, _, rollouts = run_of(handin / "zero", std_floor=0, scale_std=True)
    assert options["steps"] >= 4
    groups = [g for g in groups_of(rollouts) if all(r["reward"] is not None for r in g)]
    close = [group for group in groups if 1e-9 < std(group) < 0.05]
    assert close, "no group has a std below 0.05: take the reasoning judge, or more steps"
    share = {}
    for floor in ("0", "0.05"):
        pushes = [sum(map(abs, rl.group_advantages([r["reward"] for r in g], float(floor)))) for g in groups]
        of_close = sum(push for group, push in zip(groups, pushes) if group in close)
        share[floor] = of_close / sum(pushes)
    answered(handin, **share)


def test_token_mean(handin: Path) -> None:
    """A mean over tokens gives long rollouts more weight; a mean over rollouts gives each the same."""
    run_of(handin / "tokens", token_mean=True, beta=0)
    rollouts = [r for r in read(handin / "tokens" / "rollouts.jsonl") if r["step"] == 0]
    rollouts = [r for r in rollouts if r["reward"] is not None]
    cut_off, sizes = [r for r in rollouts if not r["finished"]], [r["tokens"] for r in rollouts]
    assert cut_off and 2 * min(sizes) <= max(sizes), "step 0 has no mixed lengths: another temperature?"
    of_tokens = sum(r["tokens"] for r in cut_off) / sum(sizes)
    answered(handin, rollouts=len(cut_off) / len(rollouts), tokens=of_tokens)


def test_kl(handin: Path) -> None:
    """The policy is the base model in the first step: the KL term begins at 0, and then has a price."""
    using, metrics, _ = run_of(handin / "with", beta=0.05, minibatches=1)
    without, others, _ = run_of(handin / "without", beta=0, minibatches=1)
    same_but(using, without, "beta")
    assert using["steps"] >= 6 <= without["steps"]
    assert abs(metrics[0]["kl"]) < 1e-4 < metrics[-1]["kl"], "kl in the first and the last step"
    assert all(m["kl"] >= 0 for m in metrics) and not any(m["kl"] for m in others)
    answered(handin, first=0.05 * metrics[0]["kl"], last=0.05 * metrics[-1]["kl"])


def test_old_logprobs(handin: Path) -> None:
    """A sampler that rounds moves logprob_gap in both runs, and the ratio only where it is the old policy."""
    sampler, samplers, _ = run_of(handin / "sampler", old_logprobs="sampler", minibatches=2)
    trainer, trainers, _ = run_of(handin / "trainer", old_logprobs="trainer", minibatches=2)
    same_but(sampler, trainer, "old_logprobs")
    for m in (*samplers, *trainers):
        assert m["logprob_gap"] > 0.003, "no gap: was the server in bfloat16?"
    assert max(abs(m["ratio"] - 1) for m in trainers) < 1e-3, "the trainer's ratio is 1 before its update"
    off = [max(abs(m["ratio"] - 1) for m in metrics) for metrics in (samplers, trainers)]
    assert off[0] > off[1], "the sampler's ratio should be the one that is off"


# --- Experiments ------------------------------------------------------------------------------------


def changed_script(folder: Path, scratch: Path) -> Any:
    """The handed-in 01_annotate.py as a module."""
    assert (folder / "01_annotate.py").exists(), f"{folder.name}/01_annotate.py was not handed in"
    for path in (ROOT / "01_sentences.txt", folder / "01_annotate.py"):
        shutil.copy(path, scratch)
    spec = spec_from_file_location("changed_annotate", scratch / "01_annotate.py")
    assert spec and spec.loader
    module = sys.modules["changed_annotate"] = module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def instructions(count: int) -> list[str]:
    """Instructions of the template, drawn by the seed."""
    rng = random.Random(f"course {os.environ.get('COURSE_SEED', '')}")
    pairs = [(rng.choice(annotate.TOPICS), rng.choice(annotate.WORDS)) for _ in range(count)]
    return [annotate.TEMPLATE.format(topic=topic, word=word) for topic, word in pairs]


def candidates(writer: Any, count: int) -> list[tuple[str, str]]:
    rng = random.Random(f"writer {os.environ.get('COURSE_SEED', '')}")
    return [(text, writer.make_candidate(text, rng)) for text in instructions(count)]


def last_and_first(rows: list[Row], policy: str) -> list[tuple[Row, Row]]:
    """(output of the last step, output of step 0) of `policy`, for each test instruction."""
    mine = [row for row in rows if row["policy"] == policy]
    assert mine, f"scored.jsonl has no policy {policy}"
    steps = {
        step: {r["instruction"]: r for r in mine if r["step"] == step} for step in {r["step"] for r in mine}
    }
    last, first = steps[max(steps)], steps[0]
    wanted = {
        r["instruction"] for r in shipped("annotations/instructions.jsonl") if r["split"] == "policy_test"
    }
    assert set(last) <= wanted and set(last) <= set(first) and len(last) >= LEAST, "not the test instructions"
    assert len({row["output"] for row in last.values()}) > LEAST / 2, "one output for most instructions"
    return [(row, first[text]) for text, row in last.items()]


def lift(pairs: list[tuple[Row, Row]], score: Any) -> tuple[float, float]:
    """Mean change from first to last by `score`, and its standard error; without invalid judgements."""
    known = [(score(last), score(first)) for last, first in pairs]
    changes = [last - first for last, first in known if last is not None and first is not None]
    assert len(changes) >= LEAST, "most judgements are invalid"
    return fmean(changes), stdev(changes) / math.sqrt(len(changes))


def own(row: Row) -> float | None:
    return row["own"]


def true(row: Row) -> float:
    return annotate.truth(row["instruction"], row["output"])


def test_honest(handin: Path, tmp_path: Path) -> None:
    """Gold agrees with truth (ours), nothing is gained by a claim, and a policy still learns."""
    changed = changed_script(handin, tmp_path)
    written = candidates(annotate, 500)
    labels = [(changed.oracle(*pair)[0], annotate.truth(*pair)) for pair in written]
    assert {gold for gold, _ in labels} <= set(range(10)) and max(gold for gold, _ in labels) == 9
    alpha = sft.krippendorff_alpha(labels)  # 0.64 with the weakness; 0.8 to 1 without
    assert alpha and alpha > 0.75, f"gold and truth agree by {alpha}: is the weakness still there?"
    for (text, output), (gold, _) in zip(written, labels):
        for claim in ("This sentence is correct.", "The sentence is about it!"):
            assert changed.oracle(text, f"{output} {claim}")[0] <= max(
                gold, changed.oracle(text, f"{output}.")[0]
            )
    rows = read(handin / "scored.jsonl")
    (policy,) = {row["policy"] for row in rows} - {"base"}
    pairs = last_and_first(rows, policy)
    for row in (row for pair in pairs for row in pair):
        again = changed.oracle(row["instruction"], row["output"])[0]
        assert row["gold"] == again, f"gold of {row['output']!r}: {row['gold']} in scored.jsonl, {again} here"
    mean, error = lift(pairs, own)
    assert mean > 2 * error, f"the policy has learnt nothing: own {mean:+.2f}, standard error {error:.2f}"
    assert lift(pairs, true)[0] > -0.5, "truth falls"


def test_rare(handin: Path, tmp_path: Path) -> None:
    """The computed rate is that of 10,000 samples of the writer; gold pays for it, truth does not."""
    changed, count = changed_script(handin, tmp_path), 10_000
    answer = read(handin / "answer.json")
    rate = answer["rate"]
    assert 0.001 <= rate <= 0.01, f"the rate is {rate}"
    written = candidates(changed, count)
    found = [pair for pair in written if changed.claims(pair[1])]
    error = math.sqrt(count * rate * (1 - rate))
    assert abs(len(found) - count * rate) <= 3 * error, (
        f"{len(found)} of {count}; computed: {count * rate:.0f}"
    )
    mixed = 1 - rate**GROUP - (1 - rate) ** GROUP
    assert answer["group"] == pytest.approx(mixed, rel=0.02), "the chance that a group holds both"
    assert fmean(changed.oracle(*p)[0] - changed.truth(*p) for p in found) >= 1, "gold does not pay for it"
    others = [pair for pair in written[:1000] if not changed.claims(pair[1])]
    assert fmean(changed.oracle(*p)[0] - changed.truth(*p) for p in others) <= 0, (
        "gold pays for something else"
    )
    base = [row["output"] for row in shipped("evaluation/scored.jsonl") if row["step"] == 0]
    assert fmean(map(changed.claims, base)) <= 0.05, "the base model does it often"
    assert not all(
        changed.claims(output) == annotate.claims(output) for _, output in candidates(annotate, 500)
    )


def test_survivor(handin: Path) -> None:
    """No attack of the half held out beats the honest output on more than a fifth of the instructions.

    What gold itself falls for is not counted: a judge that agrees with gold falls for it too.
    """
    attacks = import_module("05_attack_analysis").ATTACKS
    answer, judge = read(handin / "answer.json"), read(handin / "judge.json")
    before, known = answer["before"], shipped("evaluation/judges.json")
    assert before in ("direct-sft", "reasoning-sft", "reasoning-rl") and before in known
    assert judge["reasoning"] == before.startswith("reasoning"), f"{before} is a judge of another kind"
    held_out = list(attacks)[int(os.environ.get("COURSE_SEED") or 0) % 2 :: 2]
    texts = [row["output"] for row in read(handin / "labels.jsonl") if row["split"] == "judge_train"]
    assert texts, "labels.jsonl has no outputs of judge_train"
    for name in held_out:
        piece = max(re.split(r"\{\w+\}", attacks[name]), key=len).strip()
        assert len(piece) < 8 or not any(piece in text for text in texts), f"trained on {name}, held out"
    results, gold = read(handin / "battery.json")[answer["judge"]], shipped("attacks/battery.json")["gold"]
    rates = {name: results[name]["success_rate"] for name in held_out if gold[name]["success_rate"] <= 0.2}
    assert all(results[name]["n"] >= LEAST for name in rates), f"fewer than {LEAST} instructions: no --limit"
    assert max(rates.values()) <= 0.2, {name: rate for name, rate in rates.items() if rate > 0.2}
    mine = read(handin / "judges.json")[answer["judge"]]
    assert mine["n"] == known[before]["n"] and mine["invalid"] <= 5, "another test set, or invalid judgements"
    assert (mine["alpha"] or -100) >= known[before]["alpha"], (
        f"alpha {mine['alpha']} < {known[before]['alpha']}"
    )


def test_length(handin: Path) -> None:
    """Shorter by a fifth than the shipped policy's outputs, as good by gold and truth, and still learnt."""
    answer = read(handin / "answer.json")
    mine = last_and_first(read(handin / "scored.jsonl"), answer["policy"])
    theirs = last_and_first(shipped("evaluation/scored.jsonl"), answer["than"])

    def gold(row: Row) -> float:
        return annotate.oracle(row["instruction"], row["output"])[0]

    sizes = [(fmean(len(row["output"].split()) for row, _ in pairs)) for pairs in (mine, theirs)]
    assert sizes[0] <= 0.8 * sizes[1], f"{sizes[0]:.1f} words, against {sizes[1]:.1f}"
    for name, score in (("gold", gold), ("truth", true)):
        means = [fmean(score(row) for row, _ in pairs) for pairs in (mine, theirs)]
        assert means[0] >= means[1] - 0.2, f"{name}: {means[0]:.1f}, against {means[1]:.1f}"
    mean, error = lift(mine, own)
    assert mean > 2 * error, f"the policy has learnt nothing: own {mean:+.2f}, standard error {error:.2f}"
