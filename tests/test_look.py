"""The shipped run of `make look`, how a run is packed into it, and what is shown of a run."""

import html
import json
import re
import shlex
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ROOT, annotate, rl, sft
from safetensors.torch import load_file, save_file
from ship import LIMIT, ship
from typer.testing import CliRunner

evaluate, attacks = import_module("04_evaluate"), import_module("05_attack_analysis")
SHIPPED = ROOT / "results/demo"
TOPICS = ("rain", "snow", "ship", "wool", "cat")
TEXTS = [annotate.TEMPLATE.format(topic=topic, word="soft") for topic in TOPICS]
HOSTILE = "Soft rain | falls.\n<img src=x onerror=alert(1)> A \\ and `code`."
OUTPUTS = {"base": ["Soft rain.", "Snow", HOSTILE, "It is.", "A soft cat."]}
OUTPUTS |= {"direct": [f"Warm {n}" for n in range(5)], "reasoning": ["This sentence is soft."] * 5}


def write_adapter(folder: Path) -> None:
    about = {"base_model_name_or_path": annotate.LAPTOP_MODEL, "r": 16}
    annotate.write_json(folder / "adapter_config.json", about)
    weights = {f"layers.{n}.lora_A.weight": torch.randn(16, 8) for n in range(2)}
    save_file(weights, folder / "adapter_model.safetensors")


def stage(module: Any, line: str, status: int = 0) -> Any:
    result = CliRunner().invoke(module.app, shlex.split(line))
    assert result.exit_code == status, (result.output, result.exception)
    return result


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, evaluated by the real command; only what models say was written by hand."""
    run = tmp_path / "run"
    options = {"preset": "laptop", "gold": "oracle", "gold_effort": "none"}
    annotate.write_json(run / "annotations/config.json", {"options": options})
    rows = [{"id": str(n), "split": "policy_test", "instruction": text} for n, text in enumerate(TEXTS)]
    annotate.write_jsonl(run / "annotations/instructions.jsonl", rows)
    for name in ("labels.json", "labels.jsonl", "outputs.jsonl"):
        annotate.write_text(run / "annotations" / name, "{}\n")
    settings = {"model": annotate.LAPTOP_MODEL, "lora_rank": 16, "lora_modules": [], "max_prompt": 512}
    for name, adapter in (("direct-sft", "epoch-2"), ("reasoning-rl", "checkpoints/step-000004")):
        judge = {**settings, "adapter": adapter, "reasoning": "reasoning" in name, "max_thinking": 96}
        annotate.write_json(run / "judges" / name / "judge.json", {**judge, "temperature": 0.0})
        write_adapter(run / "judges" / name / adapter)
        write_adapter(run / "judges" / name / "epoch-1")
        annotate.write_text(run / "judges" / name / "state-000004/optimizer.pt", "large")
    base, outputs, own = f"base:{annotate.LAPTOP_MODEL}:0.7:32", [], {"direct": [], "reasoning": []}
    for name, texts in OUTPUTS.items():
        folder, who = run / "policies" / name, base
        if name != "base":
            policy = {**settings, "judge": f"{name}-{'sft' if name == 'direct' else 'rl'}", "max_tokens": 32}
            annotate.write_json(folder / "policy.json", {**policy, "temperature": 0.7})
            write_adapter(folder / "checkpoints/step-000004")
            who = evaluate.id_prefix(name, 4, folder / "checkpoints/step-000004")
            metrics = [{"step": n, "reward": 5.0 + n, "invalid": 0.1 * n} for n in range(4)]
            metrics = [{**row, "length": 9.0, "truncated": 0.0} for row in metrics]
            annotate.write_jsonl(folder / "metrics.jsonl", metrics)
            rl.report(folder)
            annotate.write_jsonl(folder / "rollouts.jsonl", [{"id": "x", "step": 0}])
        for n, text in enumerate(texts):
            row = {"id": f"{who}:{n}", "policy": name, "step": 0 if name == "base" else 4, "base": base}
            row |= {"instruction": TEXTS[n], "output": text, "tokens": 7, "finished": True}
            if name == "base":
                row["fluency"] = -1.0  # which an earlier version wrote
            outputs.append(row)
            for judge in own if name == "base" else [name]:
                own[judge].append((row["instruction"], text, None if n == 1 else 4.0 + n / 7))
    annotate.write_jsonl(run / "evaluation/outputs.jsonl", outputs)
    annotate.write_json(run / "evaluation/config.json", {"options": {}})
    annotate.write_json(run / "evaluation/judges.json", {"direct-sft": {"alpha": 61.25, "invalid": 0.0}})
    judges = evaluate.all_judges(run)
    for name, scores in own.items():
        judge = next(judge for judge in judges if judge.startswith(name))
        who = evaluate.identity(judges[judge], run)
        records = [
            {"id": evaluate.answer_key(who, annotate.judge_messages(*text)), "expected": expected}
            for *text, expected in scores
        ]
        annotate.write_jsonl(run / "evaluation/scores" / f"{judge}.jsonl", records)
    stage(evaluate, f"gold --run {run}")
    write_adapter(run / "policies/direct/checkpoints/step-000002")
    gaps = annotate.read_jsonl(run / "evaluation/scored.jsonl")
    annotate.write_jsonl(run / "attacks/gaps.jsonl", gaps)
    return run


def check_shipped(run: Path) -> None:
    """Adapters, metrics, outputs and figures of a shipped run belong together."""
    judges, policies = evaluate.all_judges(run), evaluate.trained_policies(run)
    results = annotate.read_json(run / "evaluation/gold.json", ("curves", "judges"))
    frame = pd.DataFrame(annotate.read_jsonl(run / "evaluation/scored.jsonl"))
    assert policies.keys() == results["curves"].keys() == set(frame.policy) and len(policies) >= 2
    measured = [row["id"] for row in annotate.read_jsonl(run / "annotations/instructions.jsonl")]
    for name, policy in policies.items():
        folder, rows = run / "policies" / name, frame[frame.policy == name]
        assert policy["judge"] == results["judges"][name] and judges[policy["judge"]]["adapter"].exists()
        steps = [row["step"] for row in annotate.read_jsonl(folder / "metrics.jsonl")]
        assert steps == list(range(max(policy["checkpoints"]))) and rows.step.max() == len(steps)
        assert len(policy["checkpoints"]) == 1 and (folder / "rollouts.jsonl").exists()
        assert set(rows.id.str.rpartition(":")[2]) <= set(measured)
        for about, gold, truth in zip(rows.to_dict("records"), rows.gold, rows.truth):
            text = about["instruction"], about["output"]
            assert (gold, truth) == (annotate.oracle(*text)[0], annotate.truth(*text))
        rows = rows.astype({key: float for key in evaluate.SCORES if key in rows}).sort_values("id")
        for point, again in zip(results["curves"][name], evaluate.curve(rows), strict=True):
            assert point.keys() - again.keys() <= {"fluency", "refusal"}, "which earlier runs have, too"
            assert {key: pytest.approx(point[key]) for key in again} == again
    weights = list(run.rglob("*.safetensors"))
    assert len(weights) == 2 * len(policies) and sum(path.stat().st_size for path in weights) <= LIMIT
    assert {w.dtype for path in weights for w in load_file(path).values()} == {torch.bfloat16}


@pytest.mark.skipif(not (SHIPPED / "policies").exists(), reason="results/demo holds no run yet")
def test_the_shipped_run_and_its_figures_belong_together() -> None:
    check_shipped(SHIPPED)


def test_a_run_is_packed(run: Path, tmp_path: Path) -> None:
    """Twice gives the same; the run itself is not changed; kept answers and training states stay behind."""
    target, before = tmp_path / "shipped", {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    annotate.write_text(target / "seconds.json", "{}")
    annotate.write_text(target / "policies/old/policy.json", "{}")
    for _ in range(2):
        ship(run, target)
        check_shipped(target)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    adapters = {f"policies/{name}/checkpoints/step-000004" for name in ("direct", "reasoning")}
    adapters |= {"judges/direct-sft/epoch-2", "judges/reasoning-rl/checkpoints/step-000004"}
    assert {str(Path(name).parent) for name in names if name.endswith(".safetensors")} == adapters
    assert not {name for name in names if "state-" in name or "scores" in name or name.endswith(".lock")}
    assert {"seconds.json", "policies/direct/reward.png", "evaluation/gold.png"} <= names
    assert not {"annotations/outputs.jsonl", "evaluation/outputs.jsonl", "policies/old/policy.json"} & names
    for adapter in adapters:
        old, new = (load_file(root / adapter / "adapter_model.safetensors") for root in (run, target))
        assert old.keys() == new.keys() and all(torch.equal(old[key].bfloat16(), new[key]) for key in old)
    text = (target / "evaluation/gold.json").read_text()
    for wrong in ("gold", "own_lift"):  # what does not belong together is seen
        results = json.loads(text)
        results["curves"]["direct"][-1][wrong] += 0.01
        annotate.write_json(target / "evaluation/gold.json", results)
        with pytest.raises(AssertionError):
            check_shipped(target)


def test_examples_are_the_first_test_instructions(run: Path) -> None:
    """Before and after, with their scores; a text of several lines or with a | stays in its cell."""
    frame = evaluate.examples(run)
    assert list(frame.policy) == ["direct"] * 3 + ["reasoning"] * 3
    assert list(frame.instruction) == TEXTS[:3] * 2
    assert list(frame.before) == [" ".join(text.split()) for text in OUTPUTS["base"][:3] * 2]
    assert list(frame.after) == OUTPUTS["direct"][:3] + OUTPUTS["reasoning"][:3]
    assert list(frame.own) == ["4.0 → 4.0", "invalid → invalid", "4.3 → 4.3"] * 2
    for key, grade in (("gold", lambda *text: annotate.oracle(*text)[0]), ("truth", annotate.truth)):
        ends = (frame.before.replace(" ".join(HOSTILE.split()), HOSTILE), frame.after)
        scores = [[f"{grade(*text):.1f}" for text in zip(frame.instruction, end)] for end in ends]
        assert list(frame[key]) == [" → ".join(pair) for pair in zip(*scores)]
    lines = stage(evaluate, f"examples --run {run}").output.splitlines()
    assert len(lines) == 2 + 6 and lines[0].startswith("| policy | instruction | before | after | own |")
    assert {line.replace(r"\|", "").count("|") for line in lines} == {len(frame.columns) + 1}


def test_the_page_shows_them_and_every_picture(run: Path) -> None:
    stage(attacks, f"report --run {run}")
    page = (run / "report.html").read_text("utf-8")
    pictures = [path for path in run.rglob("*.png")]
    assert page.count('src="data:image/png;base64,') == len(pictures) == 3, "gold's, and two rewards"
    page = re.sub('base64,[^"]+', "", page)
    assert page.count("<img") == 3 and html.escape(" ".join(HOSTILE.split())) in page
    assert "4.0 → 4.0" in page and "61.25" in page
    assert "http" not in page and "<script" not in page and "url(" not in page and "None" not in page
    heads = re.findall("<h2>(.*?)</h2>", page)
    assert heads[:3] == ["Findings", "Scores during training", "Reward during training"]
    assert [head.split()[0] for head in heads[3:]] == ["Outputs", "Agreement", "Last"]
    for line in evaluate.findings(run):
        assert f"{attacks.PAPER_SAYS[line[:9]]}<br><b>{line}</b>" in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert len(style.splitlines()) <= 20


def test_the_reward_is_drawn(run: Path) -> None:
    """The share of invalid ones too, if any; a step without a rewarded rollout leaves a gap."""
    folder = run / "policies/direct"
    rows, before = annotate.read_jsonl(folder / "metrics.jsonl"), (folder / "reward.png").read_bytes()
    rl.report(folder)
    assert (folder / "reward.png").read_bytes() == before, (
        "again the same, so that a second run changes nothing"
    )
    sizes = []
    for invalid in (0.0, 1.0):
        rows[2] |= {"reward": None, "invalid": invalid}
        for row in rows[:2] + rows[3:]:
            row["invalid"] = 0.0
        annotate.write_jsonl(folder / "metrics.jsonl", rows)
        rl.report(folder)
        sizes.append((folder / "reward.png").read_bytes())
    assert len({before, *sizes}) == 3


def test_ask_gold_about_an_output_of_ones_own(run: Path) -> None:
    output = "This sentence is about soft rain."
    said = stage(attacks, f"ask --run {run} --judge gold --output '{output}'").output
    label, why = annotate.oracle(TEXTS[0], output)
    assert f"instruction: {TEXTS[0]}\noutput: {output}\n" in said
    assert f"gold: label {label}, expected score {label:.2f}\n  thinking: {why}\n" in said
    assert f"truth: {annotate.truth(TEXTS[0], output)}\n" in said
    assert f"content: {annotate.content(TEXTS[0], output)} (" in said and "content" in attacks.PAGE
    empty = stage(attacks, f"ask --run {run} --judge gold --output '' --instruction '{TEXTS[1]}'").output
    assert f"instruction: {TEXTS[1]}\noutput: \n" in empty and "gold: label 0" in empty
    assert "its own template" in stage(attacks, f"ask --run {run} --instruction Hi --output x", 1).stderr


def test_ask_judges_about_what_a_policy_writes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server for all; the last adapter writes, every judge is asked with its own."""
    seen: list[Any] = []

    @contextmanager
    def serve_adapters(users: Any, *_: Any, count: int) -> Any:
        seen.append(len(users))
        yield SimpleNamespace(
            model=users[0]["model"], load_adapter=lambda _, path: seen.append(path), unload_adapter=len
        )

    def ask_judge(judge: Any, instruction: str, output: str) -> Any:
        assert (instruction, output) == (TEXTS[0], "Soft rain.")
        if judge.reasoning:
            return {"label": None, "expected": None, "cause": "thinking did not close", "thinking": "Rain: "}
        known = {"label": 9, "expected": 8.4, "cause": None, "thinking": ""}
        return {**known, "probabilities": [0.0] * 8 + [0.6, 0.4]}

    monkeypatch.setattr(sft, "serve_adapters", serve_adapters)
    monkeypatch.setattr(sft, "ask_judge", ask_judge)
    monkeypatch.setattr(evaluate, "write_output", lambda *about: {**about[-1], "output": "Soft rain."})
    said = stage(attacks, f"ask --run {run}").output
    judges = [run / "judges/direct-sft/epoch-2", run / "judges/reasoning-rl/checkpoints/step-000004"]
    assert seen == [3, run / "policies/direct/checkpoints/step-000004", *judges]
    assert (
        "direct-sft: label 9, expected score 8.40\n  0  0.00  \n" in said
        and f"  8  0.60  {'#' * 30}\n" in said
    )
    assert "reasoning-rl: label None, invalid, thinking did not close\n  thinking: Rain: \n" in said
    assert "gold: label 7" in said and "truth: 9" in said
    seen.clear()
    stage(attacks, f"ask --run {run} --judge direct --policy base")
    assert seen == [2, judges[0]]
    for wrong in ("direct:3", "nobody"):
        assert f"--policy {wrong}" in stage(attacks, f"ask --run {run} --policy {wrong}", 1).stderr
    record = annotate.read_json(run / "judges/direct-sft/judge.json")
    annotate.write_json(run / "judges/direct-sft/judge.json", {**record, "pairwise": True})
    assert "compares two" in stage(attacks, f"ask --run {run} --judge direct", 1).stderr
