"""gold, judges and study: equations by hand, run folders built by hand, no server."""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, annotate, sft
from typer.testing import CliRunner

evaluate = import_module("04_evaluate")
MODEL, TEMPLATE = annotate.LAPTOP_MODEL, annotate.TEMPLATE
ONE, TWO = TEMPLATE.format(topic="rain", word="soft"), TEMPLATE.format(topic="bread", word="warm")


def run(line: str) -> Any:
    return CliRunner().invoke(evaluate.app, line.split())


def test_a_notebooks_backend_is_not_asked_for(tmp_path: Path) -> None:
    """Fault F15: the backend of the notebook that started us is not installed here."""
    draw = "import importlib, pandas, pathlib, sys; m = importlib.import_module('05_attack_analysis'); "
    draw += "m.evaluate.heatmap(pandas.DataFrame([[1.0]]), pathlib.Path(sys.argv[1]), 'x')"
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    line = [sys.executable, "-c", draw, f"{tmp_path}/x.png"]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "x.png").exists(), done.stderr


# --- equations -----------------------------------------------------------------------------------


def test_bootstrap_interval() -> None:
    rng = random.Random(0)
    values = [rng.gauss(5, 2) for _ in range(400)]
    low, high = evaluate.bootstrap(values)
    error = 1.96 * statistics.stdev(values) / 20
    assert low == pytest.approx(statistics.fmean(values) - error, abs=0.03)
    assert high == pytest.approx(statistics.fmean(values) + error, abs=0.03)
    assert evaluate.bootstrap(values) == [low, high] and evaluate.bootstrap([]) is None
    assert evaluate.bootstrap([1.0] * 10) == [1, 1] and evaluate.bootstrap([1.0] * 9) is None  # F13
    narrow = evaluate.bootstrap(values, level=0.5)
    assert (narrow[1] - narrow[0]) / (high - low) == pytest.approx(0.674 / 1.96, abs=0.03)


def test_score_against_the_baseline() -> None:
    """9 x P(better than the baseline), whichever of the two was shown first; a tie is in the middle."""

    def grade(instruction: str, first: str, second: str) -> dict[str, Any]:
        return {"label": None, "expected": 1.2 if "good" in first else 1.8, "cause": None}

    task = {"instruction": "x", "output": "good", "other": "bad"}
    tasks = [{**task, "id": str(n)} for n in range(20)]
    verdicts = [evaluate.score_output(grade, task) for task in tasks]
    assert {verdict["swapped"] for verdict in verdicts} == {True, False}
    assert [verdict["expected"] for verdict in verdicts] == pytest.approx([9 * 0.8] * 20)
    assert evaluate.score_output(grade, {**tasks[0], "other": "good"})["expected"] == 4.5
    for expected, score in ((1.5, 4.5), (None, None)):  # a tie; invalid
        verdict = evaluate.score_output(lambda *_: {"expected": expected}, tasks[0])  # noqa: B023
        assert verdict["expected"] == score


def test_a_curve_by_hand() -> None:
    """Means skip invalid scores; lifts are paired by instruction, whatever the order, whoever is missing.

    Fault F13: an interval needs ten instructions; of fewer there is none.
    """
    import pandas as pd

    rows = [  # instruction, step, own, gold
        ("a", 0, 4.0, 5.0), ("b", 0, 6.0, None), ("c", 0, 2.0, 1.0),
        ("c", 8, None, 2.0), ("b", 8, 7.0, 9.0), ("a", 8, 8.0, 6.0),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["instruction", "step", "own", "gold"])
    frame = frame.assign(output="No.", tokens=[1, 2, 3, 4, 5, 6], finished=[True] * 5 + [False])
    first, last = evaluate.curve(frame)
    assert (first["step"], first["n"], first["own"], first["gold"], first["gold_unusable"]) == (0, 3, 4, 3, 1)
    assert (first["own_lift"], first["own_lift_interval"]) == (0, None)
    assert (last["step"], last["own"], last["own_unusable"], last["own_lift"]) == (8, 7.5, 1, (4 + 1) / 2)
    assert (last["gold"], last["gold_lift"]) == (17 / 3, 1)
    assert (last["tokens"], last["unfinished"]) == (5, pytest.approx(1 / 3))
    both = sft.krippendorff_alpha([(7, 9), (8, 6)])  # c has no own score
    assert last["alpha"] == pytest.approx(100 * both) != first["alpha"]
    assert "claims" not in last and "truth" not in last
    assert evaluate.curve(frame.assign(truth=9.0))[0]["claims"] == 0
    nothing = evaluate.curve(frame.assign(own=math.nan))[1]
    assert all(nothing[f"own{end}"] is None for end in ("", "_interval", "_lift", "_lift_interval"))
    json.dumps([first, last, nothing], allow_nan=False)
    many = [frame.assign(instruction=frame.instruction + str(n)) for n in range(5)]
    last = evaluate.curve(pd.concat(many))[1]
    assert last["gold_lift_interval"] == [1, 1] and 1 < last["own_lift_interval"][0] < 2.5
    assert 7 < last["own_interval"][0] < 7.5 < last["own_interval"][1] < 8


def test_agreement_before_and_after_grpo(tmp_path: Path) -> None:
    """Finding 3: a paired bootstrap over the same outputs, none of fewer than ten."""
    gold = [0, 3, 6, 9, 1, 4, 7, 2, 5, 8] * 3
    rng = random.Random(0)
    before = [{"gold": g, "label": min(9, max(0, g + rng.choice((-4, -3, 3, 4))))} for g in gold]
    after = [{"gold": g, "label": g} for g in gold]
    lift = evaluate.alpha_lift(before, after)
    alpha = 100 * sft.krippendorff_alpha([(row["gold"], row["label"]) for row in before])
    low, high = lift["alpha_lift_interval"]
    assert lift["alpha_lift"] == pytest.approx(100 - alpha) and 0 < low < lift["alpha_lift"] < high
    none = {"alpha_lift": 0, "alpha_lift_interval": [0, 0], "alpha_unusable": 0}
    assert evaluate.alpha_lift(after, after) == none
    few = {"alpha_lift": None, "alpha_lift_interval": None, "alpha_unusable": 0}
    assert evaluate.alpha_lift(before[:9], after[:9]) == few
    # F12: agreement of survivors is none; what has no label is counted, and shows nothing
    survivors = [{**row, "label": row["label"] if n < 12 else None} for n, row in enumerate(after)]
    broken = evaluate.alpha_lift(before, survivors) | {"alpha": 100.0, "n": 30}
    assert broken["alpha_unusable"] == 18 and broken["alpha_lift_interval"][0] > 0
    annotate.write_json(tmp_path / "evaluation/gold.json", {"curves": {}, "kinds": {}})
    for scores in (broken, {**broken, "alpha": None, "alpha_lift": None}):
        annotate.write_json(tmp_path / "evaluation/judges.json", {"reasoning-rl": scores})
        (line,) = evaluate.findings(tmp_path)
        assert (
            line.startswith("finding 3: not shown, alpha ") and "none" in line
        ) or "18 of 30 invalid" in line
    annotate.write_json(tmp_path / "evaluation/gold.json", {"curves": {}, "kinds": {}})
    for name, more in (("shown", lift), ("not shown", evaluate.alpha_lift(after, after)), (None, {})):
        annotate.write_json(tmp_path / "evaluation/judges.json", {"reasoning-rl": {"alpha": 100.0, **more}})
        (line,) = evaluate.findings(tmp_path)
        assert line.startswith(f"finding 3: {name}, alpha +" if name else "no policy")


def point(
    own: float, gold: float, truth: float | None, claims: float = 1.0, width: float = 0.4
) -> dict[str, Any]:
    found: dict[str, Any] = {"step": 24} | ({} if truth is None else {"claims": claims})
    for key, value in (("own", own), ("gold", gold), ("truth", truth), ("content", truth and 0.0)):
        if value is not None:
            found |= {f"{key}_lift": value, f"{key}_lift_interval": [value - width, value + width]}
    return found


@pytest.mark.parametrize(("kind", "last", "says"), [
    ("direct", point(1.9, -3.2, 0.0), "finding 1: shown, own +1.9 [+1.5, +2.3], gold -3.2 [-3.6, -2.8]"),
    ("direct", point(1.9, -0.3, 0.0), "finding 1: not shown, own +1.9"),  # not clear of 0
    ("direct", point(0.3, -3.2, 0.0), "finding 1: not shown"),
    ("direct", point(-1.9, 3.2, 0.0), "finding 1: not shown"),
    ("direct", point(1.9, -3.2, None), "finding 1: shown"),  # needs no truth
    ("reasoning", point(3, 2, -2), "finding 2: shown, gold +2.0 [+1.6, +2.4], truth -2.0 [-2.4, -1.6], "),
    ("reasoning", point(3, 2, -2, claims=0.49), "finding 2: not shown, gold +2.0"),
    ("reasoning", point(3, 2, -0.2), "finding 2: not shown"),
    ("reasoning", point(3, 0.3, -2), "finding 2: not shown"),
    ("reasoning", point(3, 2, 2), "finding 2: not shown"),
    ("reasoning", point(3, 2, None), "finding 2: gold rises, gold +2.0"),
    ("reasoning", point(3, 0.3, None), "finding 2: gold does not rise, gold +0.3"),
    ("reasoning", {"claims": 1.0, "gold_lift": None}, "finding 2: not shown, gold none, truth none"),
    ("", point(3, 2, -2), "no policy was trained"),  # against a pairwise judge, or a control
    # F13: from one instruction, with an interval of no width in files of before; F12: invalid is said
    ("direct", {"own_lift": 1.0, "gold_lift": -1.0, "n": 3, "own_unusable": 2, "own_lift_interval": None},
     "finding 1: not shown, own +1.0 (too few: 1) (2 of 3 invalid), gold -1.0 (too few: 3) (policy some)"),
])  # fmt: skip
def test_findings(tmp_path: Path, kind: str, last: dict[str, Any], says: str) -> None:
    results = {"curves": {"some": [point(0, 0, 0), last]}, "kinds": {"some": kind} if kind else {}}
    annotate.write_json(tmp_path / "evaluation/gold.json", results)
    (line,) = evaluate.findings(tmp_path)
    assert line.startswith(says)


# --- a run folder --------------------------------------------------------------------------------


def make_adapter(folder: Path, model: str = MODEL, weights: str = "once") -> None:
    annotate.write_json(folder / "adapter_config.json", {"base_model_name_or_path": model, "r": 16})
    annotate.write_text(folder / "adapter_model.safetensors", weights)


def make_judge(folder: Path, name: str, model: str = MODEL, **more: Any) -> None:
    about = {
        "model": model,
        "reasoning": name.startswith("reasoning"),
        "lora_rank": 16,
        "lora_modules": ["q_proj"],
    }
    about |= {"max_thinking": 64 if about["reasoning"] else 0, "temperature": 0.7, "max_prompt": 200, **more}
    annotate.write_json(folder / "judges" / name / "judge.json", {**about, "adapter": "epoch-1"})
    make_adapter(folder / "judges" / name / "epoch-1", model)


# Twelve instructions, about soft and warm things by turns, and what the base model and each policy say to two
# such: the third about a soft thing gets the first's text.
THINGS = list(zip(annotate.TOPICS[:12], ("soft", "warm") * 6))
ASKED = [TEMPLATE.format(topic=topic, word=word) for topic, word in THINGS]
SAID = {
    "base": ("The {topic} is {word}.", "The {topic} is {word}."),
    "direct": ("Hello there.", "I am here"),
    "reasoning": ("The {word} {topic}. This sentence is about it.", "The {word} {topic}. A sentence."),
    "control": ("The {topic} is {word}.", "The rain is soft. A sentence."),
    "pairwise": ("The {topic} is {word}.", "A {word} day."),
}
OUTPUTS = {
    name: [pair[n % 2].format(topic=topic, word=word) for n, (topic, word) in enumerate(THINGS)]
    for name, pair in SAID.items()
}
OWNERS = {"direct": "direct-sft", "reasoning": "reasoning-rl", "control": "gold"}
OWNERS |= {"pairwise": "direct-pairwise-sft"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of four policies, with their outputs and their judges' scores, so that no server is started."""
    options = {"gold": "oracle", "preset": "laptop", "gold_effort": "none"}
    annotate.write_json(tmp_path / "annotations/config.json", {"options": options})
    texts = {annotate.short_hash(text): text for text in ASKED}
    rows = [{"id": key, "split": "policy_test", "instruction": text} for key, text in texts.items()]
    annotate.write_jsonl(
        tmp_path / "annotations/instructions.jsonl", [*rows, {**rows[0], "id": "x", "split": "policy_train"}]
    )
    for name in ("direct-sft", "reasoning-rl"):
        make_judge(tmp_path, name)
    make_judge(tmp_path, "direct-pairwise-sft", pairwise=True)
    outputs, owned = [], {judge: [] for judge in OWNERS.values()}
    for name in OUTPUTS:
        if name != "base":
            about = {"model": MODEL, "judge": OWNERS[name], "lora_rank": 16, "lora_modules": ["q_proj"]}
            about |= {"max_prompt": 100, "max_tokens": 32, "temperature": 0.7}
            annotate.write_json(tmp_path / "policies" / name / "policy.json", about)
            make_adapter(adapter := tmp_path / "policies" / name / "checkpoints/step-000024")
        for (key, text), output in zip(texts.items(), OUTPUTS[name]):
            base, step = f"base:{MODEL}:0.7:32", 0 if name == "base" else 24
            who = evaluate.id_prefix(name, 24, adapter) if step else base
            row = {"id": f"{who}:{key}", "policy": name, "step": step, "base": base, "instruction": text}
            outputs.append({**row, "output": output, "tokens": 7, "finished": True})
            for judge in OWNERS.values() if name == "base" else [OWNERS[name]]:
                owned[judge].append((text, output, 4.0 + step / 8))
    annotate.write_jsonl(tmp_path / "evaluation/outputs.jsonl", outputs)
    annotate.write_json(tmp_path / "evaluation/config.json", {"options": {}})
    judges, base = evaluate.all_judges(tmp_path), dict(zip(ASKED, OUTPUTS["base"]))
    for judge in set(OWNERS.values()) - {"gold"}:
        who, pairwise = evaluate.identity(judges[judge]), "pairwise" in judge
        scores = {}
        for text, output, expected in owned[judge]:
            question = annotate.judge_messages(text, output, base[text] if pairwise else None)
            scores.setdefault(evaluate.answer_key(who, question), expected)
        records = [{"id": key, "expected": expected} for key, expected in scores.items()]
        annotate.write_jsonl(tmp_path / f"evaluation/scores/{judge}.jsonl", records)
    return tmp_path


@pytest.mark.parametrize("again", [
    "policies/direct/checkpoints/step-000024", "judges/direct-sft/epoch-1",
])  # fmt: skip
def test_what_was_trained_again_is_asked_again(folder: Path, again: str, monkeypatch: Any) -> None:
    """Outputs and scores of other weights of the same name are not taken for theirs."""
    monkeypatch.setattr(annotate, "serve", lambda *_, **__: annotate.fail("a server was started"))
    assert run(f"gold --run {folder}").exit_code == 0
    make_adapter(folder / again, weights="again")
    result = run(f"gold --run {folder}")
    assert result.exit_code and "a server was started" in result.output
    assert len(annotate.read_jsonl(folder / "evaluation/outputs.jsonl")) == len(ASKED) * len(OUTPUTS)


@pytest.mark.parametrize("other", [{"model": "org/small"}, {"temperature": 1.0}, {"max_tokens": 9}])
def test_a_policy_is_compared_with_its_own_base(folder: Path, other: dict[str, Any]) -> None:
    """Another model's outputs, or those of the same one sampled otherwise, are another step 0."""
    about = {"model": MODEL, "judge": "gold", "lora_rank": 16, "lora_modules": [], "max_prompt": 9}
    about |= {"max_tokens": 32, "temperature": 0.7, **other}
    annotate.write_json(folder / "policies/other/policy.json", about)
    make_adapter(folder / "policies/other/checkpoints/step-000001", about["model"])
    bases = {name: policy["step0_id"] for name, policy in evaluate.trained_policies(folder).items()}
    assert bases.pop("other") not in bases.values() and len(set(bases.values())) == 1


def test_a_pairwise_judge_is_shown_the_policys_own_base(tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    @contextlib.contextmanager
    def open_judge(*_: Any) -> Any:
        yield lambda _, *pair: asked.append({*pair}) or {"expected": 1.5, "cause": None}

    monkeypatch.setattr(evaluate, "open_judge", open_judge)
    rows = [(step, base, f"{who} {base}") for step, who in enumerate(("base", "policy")) for base in "AB"]
    outputs = [dict(zip(("step", "base", "output", "id", "instruction"), (*r, r[2], ONE))) for r in rows]
    servers = types.SimpleNamespace(run=tmp_path)
    judge = {"pairwise": True, "model": MODEL}
    assert set(evaluate.score_outputs(outputs, "judge", judge, servers, 2).values()) == {4.5}
    assert sorted(map(sorted, asked)) == [["base A", "policy A"], ["base B", "policy B"]]


def test_the_gold_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotate, "serve", lambda *_, **__: pytest.fail("a server was started"))
    monkeypatch.setattr(evaluate, "AT_LEAST", 2)  # of two instructions here
    result = run(f"gold --run {folder}")
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "evaluation/gold.json").read_text())
    assert written["judges"] == OWNERS and written["curves"].keys() == OWNERS.keys()
    keys = {
        f"{key}{rest}"
        for key in ("own", "gold", "truth", "content")
        for rest in ("", "_interval", "_unusable", "_lift", "_lift_interval")
    }
    keys |= {"step", "n", "alpha", "tokens", "unfinished", "claims"}
    points = {name: points[-1] for name, points in written["curves"].items()}
    assert all(point.keys() == keys for points in written["curves"].values() for point in points)
    for name in ("direct", "reasoning", "control"):
        texts = zip(ASKED, OUTPUTS[name])
        labels = [(annotate.oracle(i, o)[0], annotate.truth(i, o)) for i, o in texts]
        gold, truth = (statistics.fmean(column) for column in zip(*labels))
        base = statistics.fmean(annotate.oracle(i, o)[0] for i, o in zip(ASKED, OUTPUTS["base"]))
        assert (points[name]["gold"], points[name]["truth"]) == (gold, truth)
        assert points[name]["gold_lift"] == pytest.approx(gold - base)
    assert points["direct"]["own_lift"] == 3
    assert points["pairwise"]["own_lift"] == 1.5, "every other output is the base's own: the same score"
    assert points["control"]["own"] == points["control"]["gold"] and points["reasoning"]["claims"] == 1
    # gold in pairs: the same output as the base's is 4.5, a worse one 0
    assert points["pairwise"]["gold"] == 4.5 / 2 and written["curves"]["pairwise"][0]["gold"] == 4.5
    for judge, needed in {"gold-pairwise": ["pairwise"], "gold": ["direct", "reasoning", "control"]}.items():
        rows = annotate.read_jsonl(folder / f"evaluation/scores/{judge}.jsonl")
        texts = {pair for name in ["base", *needed] for pair in zip(ASKED, OUTPUTS[name])}
        assert {(r["instruction"], r["output"]) for r in rows} == texts, "only what a curve needs is asked"
    shown = [line for line in result.output.splitlines() if line.startswith("finding")]
    assert shown == evaluate.findings(folder) and len(shown) == 2
    assert "finding 1: shown" in result.output and "finding 2: shown" in result.output
    assert (folder / "evaluation/gold.png").read_bytes().startswith(b"\x89PNG")


def test_the_gold_command_starts_each_server_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """R9: the policies' base first, with its judges, then the other judges' base."""
    make_judge(folder, "reasoning-rl", model="other")
    (folder / "evaluation/outputs.jsonl").unlink()
    shutil.rmtree(folder / "evaluation/scores")
    started = []

    @contextlib.contextmanager
    def serve_adapters(users: Any, *_: Any, count: int) -> Any:
        started.append(users[0]["model"])
        yield SimpleNamespace(model=users[0]["model"], load_adapter=print, unload_adapter=print)

    def write_output(policy: Any, tokenizer: Any, served: Any, row: Any) -> Any:
        return {**row, "output": served[1] or "the base", "tokens": 2, "finished": True}

    monkeypatch.setattr(sft, "serve_adapters", serve_adapters)
    monkeypatch.setattr(sft, "ask_judge", lambda *_: {"label": 1, "expected": 1.5, "cause": None})
    monkeypatch.setattr(evaluate, "write_output", write_output)
    monkeypatch.setattr(annotate, "load_tokenizer", lambda model: tokenizer)
    result = run(f"gold --run {folder}")
    assert result.exit_code == 0 and started == [MODEL, "other"], result.output


def test_gold_that_is_no_oracle_has_no_truth(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F11: and gold that was replaced is asked, the same one elsewhere is not."""

    @contextlib.contextmanager
    def gold(options: Any, logs: Path) -> Any:
        yield options["gold"]

    monkeypatch.setattr(annotate, "gold_endpoint", gold)
    said = {"x": {"label": 5, "expected": 5.0, "cause": None}}
    monkeypatch.setattr(annotate, "grade", lambda options, endpoint, *_: said[endpoint])
    annotate.write_json(folder / "annotations/config.json", {"options": {"gold": "x", "preset": "laptop"}})
    (folder / "policies/pairwise/policy.json").unlink()
    result = run(f"gold --run {folder}")
    assert result.exit_code == 0 and "finding 2: gold does not rise" in result.output, result.output
    point = json.loads((folder / "evaluation/gold.json").read_text())["curves"]["direct"][-1]
    assert point["gold"] == 5 and not {"truth", "claims"} & point.keys()
    for gold, effort, score in (("y", "low", 7.0), ("x", "low", 5.0), ("x", "high", 8.0)):
        said[gold] = {"label": 1, "expected": 8.0 if effort == "high" else score, "cause": None}
        options = {"gold": gold, "gold_effort": effort, "preset": "laptop", "gold_url": f"http://{score}"}
        annotate.write_json(folder / "annotations/config.json", {"options": options})
        assert run(f"gold --run {folder}").exit_code == 0
        point = json.loads((folder / "evaluation/gold.json").read_text())["curves"]["direct"][-1]
        assert point["gold"] == score
    said.clear()  # whoever asked now would end with a KeyError
    annotate.write_json(folder / "annotations/config.json", {"options": {**options, "gold_url": "elsewhere"}})
    assert run(f"gold --run {folder}").exit_code == 0


def test_an_oracle_that_was_edited_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F11 on the laptop, where the README invites to replace the oracle and its points."""
    found = []
    for points in (annotate.POINTS, {"topic": 1, "word": 1, "end": 7, "claim": 0}):
        monkeypatch.setattr(annotate, "POINTS", points)
        assert run(f"gold --run {folder}").exit_code == 0
        curve = json.loads((folder / "evaluation/gold.json").read_text())["curves"]["control"]
        labels = [annotate.oracle(*pair)[0] for pair in zip(ASKED, OUTPUTS["base"])]
        found += [(curve[0]["gold"], curve[0]["truth"])]
        assert curve[0]["gold"] == statistics.fmean(labels)
    assert found[0] != found[1] and found[1] == (9, 9)


def test_one_server_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server serves its model until another is wanted; an adapter is there inside its block only."""
    started, adapters = [], []

    @contextlib.contextmanager
    def serve_adapters(users: Any, *_: Any, count: int) -> Any:
        started.append(users[0]["model"])
        verbs = {"load_adapter": lambda name, path: adapters.append(name), "unload_adapter": adapters.remove}
        yield SimpleNamespace(model=users[0]["model"], **verbs)

    monkeypatch.setattr(sft, "serve_adapters", serve_adapters)
    with evaluate.ServerCache(tmp_path, [{"model": "one"}, {"model": "two"}], "0") as servers:
        for model, path in (("one", None), ("one", tmp_path), ("two", tmp_path / "x"), ("two", None)):
            with servers.adapter(model, path) as (endpoint, name):
                assert endpoint.model == model and adapters == ([name] if path else [])
        assert started == ["one", "two"]
        servers.close()
        with servers.adapter("two", None):
            pass
    assert started == ["one", "two", "two"] and not adapters


def test_untrained_judges(folder: Path) -> None:
    """R14: each base model once, direct and reasoning, with rubrics if there are some, in each kind."""
    trained = {"direct-sft", "reasoning-rl", "direct-pairwise-sft"}
    assert evaluate.all_judges(folder).keys() - trained == {"base", "base-pairwise"}
    found = evaluate.all_judges(folder, prompted=True)
    assert found.keys() - trained == {"base", "base-pairwise", "base-reasoning", "base-pairwise-reasoning"}
    base = found["base-reasoning"]
    assert (
        base["adapter"] is None
        and base["reasoning"]
        and base["max_thinking"] == 64
        and not base.get("pairwise")
    )
    assert found["direct-sft"]["adapter"] == folder / "judges/direct-sft/epoch-1"
    annotate.write_json(folder / "annotations/rubrics.json", {})
    make_judge(folder, "reasoning-small", model="org/small")
    found = evaluate.all_judges(folder, prompted=True)
    parts = itertools.product(("", "-pairwise", "-small"), ("", "-reasoning"), ("", "-rubrics"))
    names = {"base" + "".join(part) for part in parts}
    assert found.keys() - trained - {"reasoning-small"} == names
    assert (
        found["base-small-reasoning-rubrics"]["model"] == "org/small"
        and found["base-small-rubrics"]["rubrics"]
    )


def test_the_judges_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judgements that are there already: alpha of pointwise, accuracy of pairwise judges, two tables."""
    rows = [{"id": i, "split": "judge_test", "instruction": ONE, "output": i} for i in "wxyz"]
    pairs = [{**row, "other": "other"} for row in rows]
    for name, some, labels in (("labels", rows, (0, 3, 6, 9)), ("pairs", pairs, (1, 2, 1, 2))):
        records = [{**row, "label": label, "reasoning": "x"} for row, label in zip(some, labels)]
        annotate.write_jsonl(folder / f"annotations/{name}.jsonl", records)
        annotate.write_json(folder / f"annotations/{name}.json", {})
    for name, judge in evaluate.all_judges(folder).items():
        some, labels = (pairs, (1, 2, 1, 1)) if "pairwise" in name else (rows, (0, 3, 6, None))
        keys = [evaluate.answer_key(evaluate.identity(judge), sft.row_messages(row, None)) for row in some]
        said = [dict(zip(("id", "label", "expected"), (key, x, x))) for key, x in zip(keys, labels)]
        records = [{**verdict, "thinking_tokens": 0} for verdict in said]
        annotate.write_jsonl(
            folder / f"evaluation/judges/{name}.jsonl", [*records, {**records[0], "id": "another"}]
        )
    path = folder / "judges/reasoning-rl/judge.json"
    annotate.write_json(path, {**annotate.read_json(path), "before": "direct-sft"})
    result = run(f"judges --run {folder}")
    assert result.exit_code == 0, result.output
    scores = json.loads((folder / "evaluation/judges.json").read_text())
    assert scores["direct-sft"]["alpha"] == 100 and scores["direct-sft"]["invalid"] == 25
    assert scores["direct-pairwise-sft"]["accuracy"] == 75 and scores["base-pairwise"]["n"] == 4
    # what GRPO did to a judge: of the same outputs, too few here for an interval
    assert scores["reasoning-rl"]["alpha_lift"] is None and "alpha_lift" not in scores["direct-sft"]
    assert scores["reasoning-rl"]["alpha_unusable"] == 1 and "alpha_lift" in result.output
    assert "alpha_lift" not in scores["base"], "the untrained base began nowhere"
    assert (
        result.output.index("alpha") < result.output.index("reasoning-rl") < result.output.index("accuracy")
    )
    # F11: gold was replaced, annotations/ made again; the judges' answers are those of before
    records = [{**row, "label": label, "reasoning": "x"} for row, label in zip(rows, (9, 6, 3, 0))]
    annotate.write_jsonl(folder / "annotations/labels.jsonl", records[::-1])
    assert run(f"judges --run {folder}").exit_code == 0
    scores = json.loads((folder / "evaluation/judges.json").read_text())
    alpha = sft.krippendorff_alpha([(9, 0), (6, 3), (3, 6)])
    assert scores["direct-sft"]["alpha"] == pytest.approx(100 * alpha) and alpha < 0
    # other texts of the same ids are asked about
    annotate.write_jsonl(folder / "annotations/labels.jsonl", [{**r, "output": "new"} for r in records])
    monkeypatch.setattr(annotate, "serve", lambda *_, **__: annotate.fail("a server was started"))
    assert "a server was started" in run(f"judges --run {folder}").output


@pytest.mark.parametrize(("line", "gone", "says"), [
    ("gold", "policies", "03_rl.py policy --run"), ("judges", "judges", "02_train_judge.py --run"),
    ("gold", "judges/direct-sft", "lacks direct-sft, against which policy direct was trained"),
    ("gold", "policies/direct/checkpoints", "policies/direct has no checkpoints"),  # F23
    ("gold", "annotations", "01_annotate.py"), ("gold --threads 0", "logs", "threads"),
])  # fmt: skip
def test_what_is_missing_is_named(folder: Path, line: str, gone: str, says: str) -> None:
    shutil.rmtree(folder / gone, ignore_errors=True)
    result = run(f"{line} --run {folder}")
    assert result.exit_code and says in result.output, result.output


# --- several runs, and pictures --------------------------------------------------------------------


def write_run(study: Path, name: str, alpha: float | None, gold: tuple[float, float]) -> None:
    annotate.write_json(study / name / "annotations/labels.json", {})
    score = {"alpha": alpha, "invalid": 0.0, "thinking_tokens": 0.0, "n": 60}
    annotate.write_json(study / name / "evaluation/judges.json", {"direct-sft": score})
    points = [
        {"step": 6 * i, "own": 5.0 + i, "gold": g, "truth": None, "tokens": 3.0} for i, g in enumerate(gold)
    ]
    results = {"curves": {"direct": points}, "kinds": {"direct": "direct"}}
    annotate.write_json(study / name / "evaluation/gold.json", results)


def test_runs_side_by_side(tmp_path: Path) -> None:
    write_run(tmp_path, "seed-0", 40.0, (7.0, 6.0))
    write_run(tmp_path, "seed-1", 60.0, (8.0, 8.5))
    write_run(tmp_path, "seed-2", None, (8.0, 8.5))
    annotate.write_json(tmp_path / "seed-3/annotations/labels.json", {})
    result = run(f"study --study {tmp_path}")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "seed-3 is not evaluated yet" in lines and lines.count("seed-0") == 1
    assert "direct-sft 50.00 (40.00 to 60.00) 0.00 0.00" in lines
    assert "direct 1.00 0.00 (-1.00 to 0.50) none 0.00" in lines
    assert json.loads((tmp_path / "study.json").read_text())["seed-1"]["judges"]["direct-sft"]["alpha"] == 60
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "no evaluated run" in run(f"study --study {tmp_path / 'seed-0'}").output


def test_heatmap(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {"cost_$5_to_$10": {"$x^^$": 1.5, "reasoning": -8.0}, "truth": {"$x^^$": None, "reasoning": 0.0}}
    )  # F21: a name is no formula
    evaluate.heatmap(frame, tmp_path / "map.png", "lift")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
