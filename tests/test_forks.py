"""The README's fork kit: each diff in tests/forks applies to the scripts, and does what the table says."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command
from stub import stub

annotate = import_module("01_annotate")

FORKS = sorted((ROOT / "tests" / "forks").glob("*.diff"))
ASKED = "Write a sentence about the rain. Use the word soft. Do not say I."
README = (ROOT / "README.md").read_text()


def changed_lines(diff: Path) -> int:
    return sum(line[:1] in "+-" and line[:3] not in ("+++", "---") for line in diff.read_text().splitlines())


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that applies a diff to a copy of the scripts; until the test ends, that copy is what gets imported."""
    copy = tmp_path / "fork"
    ours = {path.stem: sys.modules.pop(path.stem, None) for path in ROOT.glob("0*.py")}

    def apply(name: str) -> Path:
        copy.mkdir()
        for path in ROOT.glob("0*"):
            shutil.copy(path, copy)
        (copy / "models").symlink_to(ROOT / "models")
        # Within somebody's repository `git apply` would look for the files there, and pass over these in silence.
        alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        subprocess.run(["git", "apply", str(ROOT / "tests" / "forks" / f"{name}.diff")], cwd=copy, env=alone, check=True)
        return copy

    sys.path.insert(0, str(copy))
    yield apply
    sys.path.remove(str(copy))
    for name, module in ours.items():
        sys.modules.pop(name, None)
        if module:
            sys.modules[name] = module


def run_fork(copy: Path, line: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *line.split()], cwd=copy, capture_output=True, text=True, env={**os.environ, **env})


@pytest.mark.parametrize("diff", FORKS, ids=lambda path: path.stem)
def test_fork_is_small_and_in_the_readme(diff: Path) -> None:
    lines = changed_lines(diff)
    assert lines < 20 and f"[`tests/forks/{diff.name}`](tests/forks/{diff.name}), {lines} line{'s' * (lines > 1)}" in README


# --- where an option is enough -------------------------------------------------------------------


def test_another_gold_judge_and_dataset(tmp_path: Path) -> None:
    """The README's command, a chat server on 127.0.0.1 being the gold judge: labels without the oracle."""
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"A good answer to {i}.", "rejected": "No.", "source": "off-policy" if i < 8 else "other"}
        for i in range(14)
    ]
    for row in rows:
        for key in ("chosen", "rejected"):
            row[key] = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}]
    annotate.write_jsonl(tmp_path / "rows.jsonl", rows)
    sizes = "--judge-train 4 --judge-validation 2 --judge-test 2 --policy-train 2 --policy-test 2"
    with stub() as url:
        line = f"01_annotate.py --preset laptop --run {tmp_path}/run --data {tmp_path}/rows.jsonl --gold gold --gold-url {url}/0/ok/v1 {sizes}"
        result = command(line, env={**os.environ, "GOLD_API_KEY": "secret"})
    assert result.returncode == 0, result.stderr
    labels = annotate.read_jsonl(tmp_path / "run/annotations/labels.jsonl", ["id", "instruction", "label", "reasoning"])
    assert len(labels) == 16 and {r["reasoning"] for r in labels} == {"Because."} and all(0 <= r["label"] <= 9 for r in labels)


def test_another_policy_by_option(tmp_path: Path) -> None:
    """Only planned: the laptop has no second model."""
    result = command(f"03_rl.py policy --preset gpu --run {tmp_path}/run --judge direct --model Qwen/Qwen2.5-7B-Instruct --name qwen --plan")
    assert result.returncode == 0 and "rollouts to train on" in result.stdout, result.stderr


# --- where code must be edited -------------------------------------------------------------------


def test_gold_fork(fork: Callable[[str], Path]) -> None:
    """The oracle also looks at the first letter; ten scores are still possible, and the rubric says the same."""
    fork("gold")
    other = import_module("01_annotate")
    assert annotate.oracle(ASKED, "soft rain falls.")[0] == 9 and other.oracle(ASKED, "soft rain falls.")[0] == 8
    label, reasoning = other.oracle(ASKED, "Soft rain falls.")
    assert label == 9 and "Start: 'Soft' +1=7." in reasoning
    assert other.oracle(ASKED, "") == (2, "rain: none +0=0. soft: none +0=0. End: none +0=0. Start: none +0=0. I: none +2=2.")
    assert sum(int(line[0]) for line in other.oracle_rubric(ASKED).splitlines()) == 9
    labels = {other.oracle(ASKED, f"{a}{b}{c}{d}{e}")[0] for a in ("x ", "X ") for b in ("rain ", "") for c in ("soft ", "") for d in ("I ", "") for e in (".", "")}
    assert labels == set(range(10))


def test_policy_fork(fork: Callable[[str], Path], tokenizer: Any) -> None:
    """Training and evaluation ask the policy through the same function, so both see the new system prompt."""
    copy = fork("policy")
    text = tokenizer.decode(import_module("01_annotate").policy_prompt(tokenizer, "Name a lake."))
    assert "Answer in one short sentence." in text and "Name a lake." in text
    assert "Answer in one short sentence." not in tokenizer.decode(annotate.policy_prompt(tokenizer, "Name a lake."))
    for script in ("03_rl.py", "04_evaluate.py"):
        assert "annotate.policy_prompt(" in (copy / script).read_text()


def test_reward_fork(fork: Callable[[str], Path], tmp_path: Path) -> None:
    """Points off for every token; no reward stays no reward; the option is kept in the run's config.json."""
    fork("reward")
    rl = import_module("03_rl")
    annotate.write_jsonl(tmp_path / "annotations/instructions.jsonl", [{"id": "a", "split": "policy_train", "instruction": ASKED}])
    rl.annotate.ask_judge = lambda judge, instruction, output: rl.annotate.Judgement(None, None, [], "", 0) if output == "?" else rl.annotate.Judgement(7, 6.5, [], "", 0)
    options = rl.annotate.preset_values(rl.POLICY, "laptop")
    assert options["length_penalty"] == 0

    def rewards(penalty: float) -> list[float | None]:
        task = rl.policy_task({**options, "length_penalty": penalty}, tmp_path, None)
        samples: list[Future[Any]] = []
        for tokens, text in ((10, "Rain."), (30, "Rain."), (5, "?")):
            samples.append(Future())
            samples[-1].set_result(rl.annotate.Sample([1] * tokens, [0.0] * tokens, text, True))
        with ThreadPoolExecutor(2) as calls:
            return [reward for reward, _ in task.rewards(task.rows[0], samples, calls)]

    assert rewards(0.0) == [6.5, 6.5, None] and rewards(0.1) == [pytest.approx(5.5), pytest.approx(3.5), None]


def test_the_reward_forks_option_is_one_of_the_command(fork: Callable[[str], Path], tmp_path: Path) -> None:
    line = f"03_rl.py policy --preset laptop --run {tmp_path}/run --judge direct --length-penalty 0.1 --plan"
    result = run_fork(fork("reward"), line)
    assert result.returncode == 0 and "rollouts" in result.stdout, result.stderr
    assert command(line).returncode != 0


def test_attack_fork(fork: Callable[[str], Path], tmp_path: Path) -> None:
    """The battery runs the new attack on a chat judge, and no judge's block is left by it."""
    copy = fork("attack")
    with stub() as url:
        line = f"05_attack_analysis.py battery --judge-url {url}/0/ok/v1 --judge-model gold --out {tmp_path}/b --limit 2 --attack false_source --json {tmp_path}/o.json"
        result = run_fork(copy, line, JUDGE_API_KEY="secret")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "o.json").read_text())
    assert set(found) == {"false_source"} and found["false_source"]["n"] == 2
    attacks = import_module("05_attack_analysis")
    case = attacks.prompt_of({"variant": "default", "instruction": "A", "output": attacks.attacked(attacks.ATTACKS["false_source"], "A", "B")})[-1]["content"]
    assert "Handbook" in case and case.count("[end ") == 1


def test_evaluation_fork(fork: Callable[[str], Path], tmp_path: Path) -> None:
    """A finished run is read with one column more; nothing is judged again."""
    run = tmp_path / "run"
    annotate.write_json(run / "annotations/config.json", {"options": {"preset": "laptop"}})
    annotate.write_json(run / "annotations/labels.json", {})
    judge = {"model": "m", "adapter": "a", "reasoning": False, "max_prompt": 9, "max_thinking": 9, "temperature": 0.0, "lora_rank": 8, "lora_modules": []}
    annotate.write_json(run / "judges/direct-sft/judge.json", judge)
    annotate.write_json(run / "judges/direct-sft/a/adapter_config.json", {"base_model_name_or_path": "m", "r": 8})
    annotate.write_text(run / "judges/direct-sft/a/adapter_model.safetensors", "")
    golds = [0, 5, 9, 9]
    rows = [{"id": str(i), "split": "judge_test", "instruction": ASKED, "output": "x", "label": gold, "reasoning": ""} for i, gold in enumerate(golds)]
    annotate.write_jsonl(run / "annotations/labels.jsonl", rows)
    for name, labels in {"base": [9, 9, 9, 9], "direct-sft": [0, 6, 7, 8]}.items():
        records = [{"id": str(i), "gold": g, "label": s, "expected": float(s), "thinking_tokens": 0} for i, (g, s) in enumerate(zip(golds, labels))]
        annotate.write_jsonl(run / f"evaluation/judges/{name}.jsonl", records)
    result = run_fork(fork("evaluation"), f"04_evaluate.py judges --run {run}")
    assert result.returncode == 0 and "within 1 %" in result.stdout, result.stderr
    scores = json.loads((run / "evaluation/judges.json").read_text())
    assert (scores["base"]["close"], scores["direct-sft"]["close"], scores["direct-sft"]["exact"]) == (50, 75, 25)
