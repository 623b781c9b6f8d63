"""A judge of low-effort reasoning that sees rubrics, from its labels to a policy that pleases it, on a live server."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import command

annotate = import_module("01_annotate")

RUN = Path("runs/test-efforts")
DATA = "--judge-train 6 --judge-validation 3 --judge-test 4 --policy-train 6 --policy-test 3 --outputs 2 --output-tokens 16"
RL = "--steps 1 --prompts 2 --group 2 --minibatches 1 --checkpoint-every 1 --max-tokens 32"
COMMANDS = [
    f"01_annotate.py --preset laptop --run {RUN} {DATA}",
    f"01_annotate.py --run {RUN} {DATA} --efforts low,high --rubrics",
    f"02_train_judge.py --run {RUN} --reasoning --effort low --rubrics --epochs 1 --max-thinking 32",
    f"03_rl.py judge --run {RUN} --judge reasoning-low-rubrics {RL}",
    f"03_rl.py policy --run {RUN} --judge reasoning-low-rubrics-sft {RL}",
    f"04_evaluate.py judges --run {RUN}",
]


@pytest.fixture(scope="module")
def finished() -> Any:
    shutil.rmtree(RUN, ignore_errors=True)
    results, files = [], []
    for line in COMMANDS:
        results.append(command(line))
        files.append({p.name: p.read_bytes() for p in (RUN / "annotations").glob("*")})
    yield results, files
    shutil.rmtree(RUN, ignore_errors=True)


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_command(finished: Any, number: int) -> None:
    result = finished[0][number]
    assert result.returncode == 0, f"{COMMANDS[number]}\n{result.stdout}\n{result.stderr}"


def test_what_came_later_left_the_labels_as_they_were(finished: Any) -> None:
    first, second = finished[1][:2]
    assert {name: second[name] for name in first} == first
    assert set(second) - set(first) == {"labels-low.json", "labels-low.jsonl", "rubrics.json", "rubrics.jsonl"}
    assert "starting vLLM" in finished[0][0].stdout and "starting vLLM" not in finished[0][1].stdout


def test_the_judge_says_what_it_is(finished: Any) -> None:
    for name in ("reasoning-low-rubrics-sft", "reasoning-low-rubrics-rl"):
        judge = json.loads((RUN / "judges" / name / "judge.json").read_text())
        assert judge["rubrics"] is True and judge["effort"] == "low" and judge["reasoning"]
    evaluated = json.loads((RUN / "evaluation/judges.json").read_text())
    assert {"base", "reasoning-low-rubrics-sft", "reasoning-low-rubrics-rl"} == set(evaluated)
