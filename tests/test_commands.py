"""Every command of the README at its smallest, as a user runs it, on real servers and real training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command, descendants, living, processes_naming

annotate = import_module("01_annotate")

RUN = Path("runs/test-smallest")
DATA = "--judge-train 6 --judge-validation 4 --judge-test 4 --policy-train 6 --policy-test 3 --outputs 2 --output-tokens 16"
RL = "--steps 2 --prompts 2 --group 3 --minibatches 2 --checkpoint-every 1"
COMMANDS = [
    f"01_annotate.py --preset laptop --run {RUN} {DATA}",
    f"02_train_judge.py --preset laptop --run {RUN} --no-reasoning --epochs 1",
    f"02_train_judge.py --preset laptop --run {RUN} --reasoning --epochs 1 --max-thinking 64",
    f"03_rl.py judge --preset laptop --run {RUN} --judge reasoning {RL} --max-tokens 64",
    f"03_rl.py policy --preset laptop --run {RUN} --judge direct {RL} --max-tokens 16",
    f"03_rl.py policy --preset laptop --run {RUN} --judge reasoning {RL} --max-tokens 16 --beta 0.01",
    f"01_annotate.py --run {RUN} {DATA} --pairs --efforts low,high --rubrics",
    f"02_train_judge.py --run {RUN} --reasoning --effort low --rubrics --epochs 1 --max-thinking 32",
    f"03_rl.py policy --run {RUN} --judge reasoning-low-rubrics --steps 1 --prompts 1 --group 3 --minibatches 1 --max-tokens 16",
    f"02_train_judge.py --run {RUN} --no-reasoning --pairwise --epochs 1",
    f"03_rl.py judge --run {RUN} --judge direct-pairwise --from base --steps 1 --prompts 1 --group 2 --minibatches 1 --max-tokens 4",
    f"03_rl.py policy --run {RUN} --judge direct-pairwise --steps 1 --prompts 2 --group 3 --minibatches 1 --max-tokens 16",
    f"04_evaluate.py judges --run {RUN}",
    f"04_evaluate.py gold --run {RUN}",
    f"05_attack_analysis.py transfer --run {RUN}",
    f"05_attack_analysis.py patterns --run {RUN}",
    f"05_attack_analysis.py battery --run {RUN} --judge direct --limit 1 --attack refusal --attack top_digit",
    f"05_attack_analysis.py summary --run {RUN}",
    f"05_attack_analysis.py report --run {RUN}",
]


@pytest.fixture(scope="module")
def finished() -> Any:
    """The outputs of all commands, one after the other; what the first one wrote stays as it is."""
    shutil.rmtree(RUN, ignore_errors=True)
    results = [command(COMMANDS[0])]
    labels = {path: path.read_bytes() for path in (RUN / "annotations").glob("*")}
    results += [command(line) for line in COMMANDS[1:]]
    assert all(path.read_bytes() == text for path, text in labels.items())
    yield results
    shutil.rmtree(RUN, ignore_errors=True)


def snapshot() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(RUN.rglob("*")) if p.is_file() and p.parent.name != "logs"}


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_command(finished: Any, number: int) -> None:
    result = finished[number]
    assert result.returncode == 0, f"{COMMANDS[number]}\n{result.stdout}\n{result.stderr}"


def test_every_record_once_and_whole(finished: Any) -> None:
    counts = {"annotations/labels.jsonl": 28, "policies/direct/metrics.jsonl": 2, "evaluation/outputs.jsonl": 21}
    for path in RUN.rglob("*.jsonl"):
        records = annotate.read_jsonl(path)
        key = "step" if path.name == "metrics.jsonl" else "id"
        assert len({r[key] for r in records}) == len(records) > 0, path
        assert len(records) == counts.get(str(path.relative_to(RUN)), len(records)), path


def test_results_have_their_form(finished: Any) -> None:
    judges = json.loads((RUN / "evaluation/judges.json").read_text())
    rubrics = json.loads((RUN / "judges/reasoning-low-rubrics-sft/judge.json").read_text())
    assert rubrics["rubrics"] is True and rubrics["effort"] == "low"
    pairwise = {"base-pairwise", "direct-pairwise-sft", "direct-pairwise-base-rl"}
    assert set(judges) == {"base", "direct-sft", "reasoning-sft", "reasoning-rl", "reasoning-low-rubrics-sft", *pairwise}
    assert {name for name in judges if "accuracy" in judges[name]} == pairwise
    curves = json.loads((RUN / "evaluation/gold.json").read_text())["curves"]
    assert curves["direct-pairwise"][0]["own"] == curves["direct-pairwise"][0]["gold"] == 4.5, "the baseline against itself"
    assert [p["step"] for p in curves["direct"]] == [0, 1, 2]
    for key in ("gold", "fluency", "overlap"):
        assert curves["direct"][0][key] == curves["reasoning"][0][key], "both policies start at the same base model"
    assert all(p["fluency"] < 0 < p["overlap"] < 1 for points in curves.values() for p in points)
    transfer = json.loads((RUN / "attacks/transfer.json").read_text())
    assert set(transfer["direct"]) == {"gold", *judges}
    gold = transfer["direct"]["gold"]
    assert gold["lift"] == pytest.approx(curves["direct"][-1]["gold"] - curves["direct"][0]["gold"])
    assert curves["direct"][-1]["gold_lift"] == pytest.approx(gold["lift"])
    assert curves["direct"][0]["gold_lift"] == 0 and curves["direct"][0]["own_lift_interval"] == [0, 0]
    for name in ("evaluation/gold.png", "attacks/transfer.png", "attacks/patterns.png", "attacks/battery/battery.png"):
        assert (RUN / name).read_bytes().startswith(b"\x89PNG")
    metrics = annotate.read_jsonl(RUN / "policies/direct/metrics.jsonl")
    assert all(m["gap"] < 1e-3 for m in metrics), "before its first update a step's trainer and sampler agree"
    assert "transfer of policy direct" in finished[-2].stdout and (RUN / "report.html").exists()


def test_a_second_run_finds_its_work_done(finished: Any) -> None:
    before, began = snapshot(), time.perf_counter()
    for line in COMMANDS:
        result = command(line)
        assert result.returncode == 0 and "starting vLLM" not in result.stdout
    assert time.perf_counter() - began < 60
    after = snapshot()
    assert all(k.endswith(".png") for k in before if before[k] != after.get(k))


def test_killed_and_resumed_policy_ends_like_an_uninterrupted_one(finished: Any) -> None:
    """Same step sequence, prompts, learning rates and optimiser steps; no server left; the rest is sampling."""
    line = COMMANDS[4].replace("--steps 2", "--steps 4")
    other = RUN.with_name("test-killed")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(RUN, other, ignore=shutil.ignore_patterns("policies", "evaluation", "attacks"))
    line = line.replace(str(RUN), str(other))
    folder = other / "policies" / "direct"
    try:
        process = subprocess.Popen([sys.executable, *line.split()], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not import_module("02_train_judge").latest_state(folder)[0]:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        result = command(line)
        assert result.returncode == 0, result.stderr
        assert "going on after step" in result.stdout
        metrics = annotate.read_jsonl(folder / "metrics.jsonl")
        rl = import_module("03_rl")
        rows = [r for r in annotate.read_jsonl(other / "annotations/instructions.jsonl") if r["split"] == "policy_train"]
        assert [m["step"] for m in metrics] == [0, 1, 2, 3]
        for m in metrics:
            assert m["prompt_ids"] == [r["id"] for r in rl.prompts_of_step(rows, m["step"], 2, 0)]
            assert m["rollouts"] == 6 and m["gap"] < 1e-3
        rollouts = annotate.read_jsonl(folder / "rollouts.jsonl")
        assert len({r["id"] for r in rollouts}) == len(rollouts) == 4 * 6
        from safetensors.torch import load_file

        moments = load_file(folder / "state-000004" / "optimizer.safetensors")
        steps = {int(v) for k, v in moments.items() if k.endswith(".step")}
        assert len(steps) == 1 and steps.pop() <= 8, "four steps of two optimiser steps (fewer where a minibatch was flat)"
        assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [f"step-{i:06d}" for i in range(1, 5)]
        assert not (folder / "served").exists() and not processes_naming(str(other))
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_two_ranks_two_servers_and_one_of_them_dies(finished: Any) -> None:
    """Ranks share each step's prompts; a server killed in mid-run is replaced and the run ends whole."""
    line = f"{COMMANDS[4].replace('--judge direct', '--judge direct-sft --name ranks')} --train-gpus 0,1 --policy-gpus 0,1 --overlap"
    folder = RUN / "policies" / "ranks"
    output = RUN / "ranks.log"
    try:
        with output.open("wb") as log:
            process = subprocess.Popen([sys.executable, *line.replace("--steps 2", "--steps 4").split()], cwd=ROOT, stdout=log, stderr=log)
        while import_module("02_train_judge").latest_state(folder)[0] < 1:
            assert process.poll() is None, output.read_text()
            time.sleep(0.1)
        ours = descendants(process.pid)
        server = next(pid for pid in ours if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[2:3] == [b"vllm.entrypoints.openai.api_server"])
        os.kill(server, signal.SIGKILL)
        assert process.wait(timeout=600) == 0, output.read_text()
        assert "starting servers again" in output.read_text()
        metrics = annotate.read_jsonl(folder / "metrics.jsonl")
        assert [m["step"] for m in metrics] == [0, 1, 2, 3] and any(m["stale"] for m in metrics)
        assert all(m["rollouts"] == 6 and len(m["prompt_ids"]) == 2 for m in metrics)
        assert all(m["gap"] < 1e-3 for m in metrics if not m["stale"])
        deadline = time.monotonic() + 10  # one was once seen a moment after the command's end
        while any(living(pid) for pid in ours) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ours if living(pid)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        output.unlink()


def test_changed_options_do_not_mix(finished: Any) -> None:
    before = snapshot()
    result = command(COMMANDS[4].replace("--group 3", "--group 2"))
    assert result.returncode == 1 and "group = 3 (now 2)" in result.stderr and snapshot() == before


def test_another_preset_is_refused(finished: Any) -> None:
    result = command(f"03_rl.py policy --preset gpu --run {RUN} --judge direct")
    assert result.returncode == 1 and "--preset laptop" in result.stderr


def test_gold_by_a_live_chat_model(server: Any, tmp_path: Path) -> None:
    """The second gold path: preference data, and a chat model at a URL, here SmolLM2 itself."""

    def turns(number: int, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": answer}]

    rows = [
        {"prompt": f"Question {i}?", "chosen": turns(i, "An answer."), "rejected": turns(i, "No."), "source": "off-policy" if i < 8 else "other"}
        for i in range(16)
    ]
    annotate.write_jsonl(tmp_path / "rows.jsonl", rows)
    sizes = "--judge-train 4 --judge-validation 2 --judge-test 2 --policy-train 2 --policy-test 2"
    result = command(
        f"01_annotate.py --preset laptop --run {tmp_path}/run --data {tmp_path}/rows.jsonl {sizes} --gold {server.model} "
        f"--gold-url {server.url} --gold-tokens 4",
        env={**os.environ, "GOLD_API_KEY": server.key},
    )
    assert result.returncode == 0, result.stderr
    labels = annotate.read_jsonl(tmp_path / "run/annotations/labels.jsonl", ["id", "label", "reasoning", "cause"])
    assert len(labels) == 16 and all((r["label"] is None) == (r["cause"] is not None) for r in labels)
    assert server.key not in "".join(p.read_text(errors="replace") for p in (tmp_path / "run").rglob("*") if p.is_file())
