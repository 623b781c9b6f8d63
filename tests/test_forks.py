"""The fork kit: each diff in tests/forks applies to the scripts, and does what tests/forks/README.md says."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, annotate
from stub import stub

FORKS = sorted((ROOT / "tests" / "forks").glob("*.diff"))
ASKED = "Write a sentence about the soft rain. The sentence must be correct."


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that applies a diff to a copy of the scripts, which is what the test then imports."""
    copy = tmp_path / "fork"
    ours = {path.stem: sys.modules.pop(path.stem, None) for path in ROOT.glob("0*.py")}

    def apply(name: str) -> Path:
        copy.mkdir()
        for path in ROOT.glob("0*"):
            shutil.copy(path, copy)
        (copy / "models").symlink_to(ROOT / "models")
        # Within a repository `git apply` would look for the files there, and pass over these in silence.
        alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        diff = ROOT / "tests" / "forks" / f"{name}.diff"
        subprocess.run(["git", "apply", str(diff)], cwd=copy, env=alone, check=True)
        return copy

    sys.path.insert(0, str(copy))
    yield apply
    sys.path.remove(str(copy))
    for name, module in ours.items():
        sys.modules.pop(name, None)
        if module:
            sys.modules[name] = module


@pytest.mark.parametrize("diff", FORKS, ids=lambda path: path.stem)
def test_a_fork_is_small_and_in_the_table(diff: Path) -> None:
    lines = diff.read_text().splitlines()
    changed = sum(line[:1] in "+-" and line[:3] not in ("+++", "---") for line in lines)
    assert changed < 20 and f"`{diff.name}`" in (ROOT / "tests" / "forks" / "README.md").read_text()


def test_gold_fork(fork: Callable[[str], Path]) -> None:
    """The oracle also looks at the first letter; the scores still vary, and the rubric says the same."""
    fork("gold")
    other, text = import_module("01_annotate"), "oft rain falls. A sentence."
    assert [other.oracle(ASKED, first + text)[0] for first in "Ss"] == [9, 8]
    assert [annotate.oracle(ASKED, first + text)[0] for first in "Ss"] == [9, 9]
    assert "Start: 'soft' +0=5." in other.oracle(ASKED, f"s{text}")[1]
    assert sum(int(line[0]) for line in other.oracle_rubric(ASKED).splitlines()) == 9
    rng = other.random.Random(0)
    drawn = {other.oracle(ASKED, other.make_candidate(ASKED, rng))[0] for _ in range(500)}
    assert drawn == set(range(1, 10))  # all candidates start with a capital


def test_rubric_fork(fork: Callable[[str], Path]) -> None:
    """Gold wants a word that the rubric names and the instruction does not; both find it in an answer."""
    fork("rubric")
    other = import_module("01_annotate")
    topic, wanted = other.parse_template(ASKED)
    assert topic == "rain" and wanted in other.WORDS and wanted not in ASKED.split()
    assert f"3: says {wanted}." in other.oracle_rubric(ASKED)
    assert [other.oracle(ASKED, f"A {word} rain falls.")[0] for word in ("soft", wanted)] == [4, 7]
    assert f"{wanted}: '{wanted} rain' +3=6." in other.oracle(ASKED, f"A {wanted} rain falls.")[1]
    asked = [other.TEMPLATE.format(word="soft", topic=topic) for topic in other.TOPICS]
    assert len({other.parse_template(text)[1] for text in asked}) > 20  # it differs between instructions


def test_policy_fork(fork: Callable[[str], Path], tokenizer: Any) -> None:
    """Training and evaluation ask the policy through the same function, so both see the new system prompt."""
    copy, rules = fork("policy"), "Answer in one short sentence."
    other = import_module("01_annotate")
    assert rules in tokenizer.decode(other.policy_prompt(tokenizer, "Name a lake."))
    assert rules not in tokenizer.decode(annotate.policy_prompt(tokenizer, "Name a lake."))
    for script in ("03_rl.py", "04_evaluate.py"):
        assert "annotate.policy_prompt" in (copy / script).read_text()


def test_reward_fork(fork: Callable[[str], Path], tmp_path: Path) -> None:
    """Points off for every token; no reward stays no reward; the option is one of the command."""
    copy = fork("reward")
    rl, path = import_module("03_rl"), tmp_path / "annotations" / "instructions.jsonl"
    annotate.write_jsonl(path, [{"id": "a", "split": "policy_train", "instruction": ASKED}])
    options = {"model": str(ROOT / annotate.LAPTOP_MODEL), "judge_record": None, "max_prompt": 99}
    options["task"] = "policy"
    texts = ((10, "Rain."), (30, "Rain."), (5, "?"))
    samples = [annotate.Sample([1] * tokens, [0.0] * tokens, text, True) for tokens, text in texts]

    def rewards(penalty: float) -> list[float | None]:
        ask = lambda text, output: {"expected": None if output == "?" else 6.5}  # noqa: E731
        task = rl.policy_task({**options, "length_penalty": penalty}, tmp_path, ask)
        with ThreadPoolExecutor(2) as pool:
            return task.rewards(task.rows[0], samples, pool)[0]

    assert rewards(0.0) == [6.5, 6.5, None] and rewards(0.1) == [pytest.approx(5.5), pytest.approx(3.5), None]
    line = [sys.executable, "03_rl.py", "policy", "--help"]
    assert "--length-penalty" in subprocess.run(line, cwd=copy, capture_output=True, text=True).stdout


def test_attack_fork(fork: Callable[[str], Path], tmp_path: Path) -> None:
    """The battery runs the new attack on a chat judge."""
    copy = fork("attack")
    with stub() as url:
        line = f"battery --judge-url {url}/9/ok/v1 --judge-model gold --out {tmp_path}/b --limit 2"
        parts = [sys.executable, "05_attack_analysis.py", *line.split(), "--attack", "false_source"]
        env = {**os.environ, "JUDGE_API_KEY": "secret"}
        done = subprocess.run(parts, cwd=copy, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = annotate.read_json(tmp_path / "b/battery.json")["gold"]
    assert set(found) == {"false_source"} and found["false_source"]["n"] == 2


def test_evaluation_fork(fork: Callable[[str], Path]) -> None:
    fork("evaluation")
    pairs = zip([0, 5, 9, 9], [0, 6, 7, 8])
    rows = [{"gold": g, "label": s, "expected": float(s), "thinking_tokens": 0} for g, s in pairs]
    scores = import_module("02_train_judge").agreement(rows)
    assert (scores["close"], scores["exact"]) == (75, 25)
