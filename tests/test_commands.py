"""The README's commands at their smallest, as a user runs them, on real servers and real training."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, annotate, command, descendants, living, rl, sft, two_ranks
from typer.testing import CliRunner

RUN = Path("runs/test-smallest")
SIZES = "--judge-train 6 --judge-validation 3 --judge-test 3 --policy-train 6 --policy-test 3 --outputs 2"
RL = "--steps 2 --prompts 2 --group 3 --max-tokens 16 --checkpoint-every 1"
ONE = "--steps 1 --prompts 1 --group 2 --minibatches 1"
NAME = "reasoning-low-rubrics"
GAP = 0.05 if torch.cuda.is_available() else 1e-3  # bfloat16 on a GPU, float32 on a CPU
COMMANDS = [
    f"01_annotate.py --preset laptop --run {RUN} {SIZES} --pairs --efforts low,high --rubrics",
    f"02_train_judge.py --run {RUN} --no-reasoning --epochs 2 --batch 12",
    f"02_train_judge.py --run {RUN} --reasoning --effort low --rubrics --epochs 1 --max-thinking 48",
    f"02_train_judge.py --run {RUN} --no-reasoning --pairwise --epochs 1 --batch 6",
    f"03_rl.py judge --run {RUN} --judge {NAME} {ONE}",
    f"03_rl.py policy --run {RUN} --judge direct {RL}",
    f"03_rl.py policy --run {RUN} --judge {NAME} --beta 0.01 {ONE} --max-tokens 16",
    f"03_rl.py policy --run {RUN} --judge direct-pairwise --opponents 2 {ONE} --max-tokens 16",
    f"04_evaluate.py judges --run {RUN}",
    f"04_evaluate.py gold --run {RUN}",
    f"05_attack_analysis.py patterns --run {RUN}",
    f"05_attack_analysis.py battery --run {RUN} --judge direct --judge direct-pairwise --limit 1 "
    "--attack refusal",
    f"04_evaluate.py examples --run {RUN}",
    f"05_attack_analysis.py ask --run {RUN} --judge direct --judge {NAME}-rl",
]


@pytest.fixture(scope="module")
def finished() -> Iterator[list[Any]]:
    """What became of all commands, one after the other."""
    shutil.rmtree(RUN, ignore_errors=True)
    yield [command(line) for line in COMMANDS]
    shutil.rmtree(RUN, ignore_errors=True)


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_command(finished: list[Any], number: int) -> None:
    result = finished[number]
    assert result.returncode == 0, f"{COMMANDS[number]}\n{result.stdout}\n{result.stderr}"


def test_what_the_commands_left_behind(finished: list[Any]) -> None:
    counts = {
        "annotations/labels.jsonl": 24,
        "policies/direct/metrics.jsonl": 2,
        "policies/direct/rollouts.jsonl": 12,
    }
    parts = ("annotations", "judges", "policies")
    for path in (path for part in parts for path in (RUN / part).rglob("*.jsonl")):
        records, name = annotate.read_jsonl(path), str(path.relative_to(RUN))
        key = "step" if path.name == "metrics.jsonl" else "id"
        assert len({r[key] for r in records}) == len(records) == counts.get(name, len(records)) > 0, path
        for r in records if path.name == "metrics.jsonl" and "policies" in name else ():
            assert (r["logprob_gap"] or 0) < GAP, "trainer and sampler agree; None: every advantage was zero"
    for name in ("direct-sft", f"{NAME}-sft", f"{NAME}-rl", "direct-pairwise-sft"):
        folder, judge = sft.find_judge(RUN, name)
        assert (folder / judge["adapter"]).exists() and judge["rubrics"] == (NAME in name)
    used = {"direct": "direct-sft", NAME: f"{NAME}-rl", "direct-pairwise": "direct-pairwise-sft"}
    policies = {path.parent.name: json.loads(path.read_text()) for path in RUN.glob("policies/*/policy.json")}
    assert {name: policy["judge"] for name, policy in policies.items()} == used
    assert len(list(RUN.glob("policies/direct/checkpoints/step-00000[12]/adapter_model.safetensors"))) == 2
    points = json.loads((RUN / "evaluation/gold.json").read_text())["curves"]["direct"]
    assert [(point["step"], point["n"]) for point in points] == [(0, 3), (1, 2), (2, 3)]  # half in between
    assert not [path for name in ("served", "*.part", "unfinished") for path in RUN.rglob(name)]
    asked = finished[-1].stdout
    assert "direct-sft: label" in asked and f"{NAME}-rl: label" in asked and "gold: label" in asked


def snapshot() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in RUN.rglob("*") if p.is_file() and p.parent.name != "logs"}


def test_a_second_time_there_is_nothing_to_do(finished: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And other options, or another preset, are refused; nothing is changed by either."""
    before = snapshot()
    monkeypatch.setattr(annotate, "serve", lambda *_, **__: pytest.fail("a server was started"))
    for line in COMMANDS[:8]:
        script, *words = line.split()
        app = import_module(script.removesuffix(".py")).app
        assert CliRunner().invoke(app, words).exit_code == 0, line
        words = [*words, "--seed", "5"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1 and "seed = 0" in result.stderr
    other = f"--preset gpu --gold oracle --data template --policy-model {annotate.LAPTOP_MODEL} --run {RUN}"
    result = CliRunner().invoke(annotate.app, other.split())
    assert result.exit_code == 1 and "preset = 'laptop'" in result.stderr
    assert snapshot() == before


def start(line: str, output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as log:
        return subprocess.Popen([sys.executable, *line.split()], cwd=ROOT, stdout=log, stderr=log)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.1)


@two_ranks
def test_killed_and_resumed(finished: list[Any], tmp_path: Path) -> None:
    """kill -9 of a command with two ranks and two servers; then of another's server. No process is left, the
    same command resumes each time, and the end is that of an uninterrupted run."""
    line = COMMANDS[5].replace("--steps 2", "--steps 4 --name killed")
    folder, log = RUN / "policies" / "killed", tmp_path / "log"
    process = start(f"{line} --train-gpus 0,1 --policy-gpus 0,1", log)
    wait_for(lambda: sft.latest_state(folder)[0] >= 1, process)
    ours = descendants(process.pid)
    assert len(ours) > 3
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(living, ours)))
    done, process = sft.latest_state(folder)[0], start(line, log)  # the number of ranks may change
    wait_for(lambda: sft.latest_state(folder)[0] > done, process)
    for pid in descendants(process.pid):
        if b"--port" in Path(f"/proc/{pid}/cmdline").read_bytes():
            subprocess.run(["kill", "-9", str(pid)])
    assert process.wait(timeout=600) == 1
    text = log.read_text()
    error = text.split("error: ")[1]
    assert "Traceback" not in text and "run the same command again" in error and ".log" in error
    result = command(line)
    assert result.returncode == 0, result.stderr
    metrics = annotate.read_jsonl(folder / "metrics.jsonl")
    rows = [
        r for r in annotate.read_jsonl(RUN / "annotations/instructions.jsonl") if r["split"] == "policy_train"
    ]
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    for m in metrics:
        assert sorted(m["prompt_ids"]) == sorted(r["id"] for r in rl.prompts_of_step(rows, m["step"], 2, 0))
        assert m["rollouts"] == 6 and (m["logprob_gap"] or 0) < GAP
    records = annotate.read_jsonl(folder / "rollouts.jsonl")
    assert len({r["id"] for r in records}) == len(records) == 24
    state = torch.load(folder / "state-000004" / "optimizer.pt", weights_only=True)["state"]
    assert {int(s["step"]) for s in state.values()} <= set(range(1, 9)), "at most two optimiser steps a step"
    assert len(list((folder / "checkpoints").iterdir())) == 4
