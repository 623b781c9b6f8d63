"""Every kind of bad input ends the command with a line or two that name it, before any work, and changes nothing.

The commands run in this process with the expensive parts (servers, models) forbidden; a few run as a
user runs them, for the exit status and what a terminal shows. `python -m pytest tests/test_bad_input.py`
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command
from stub import stub
from typer.testing import CliRunner

STAGES = {"01": "01_annotate", "02": "02_train_judge", "03": "03_rl", "04": "04_evaluate"}
annotate, sft, rl, evaluate = (import_module(name) for name in STAGES.values())
MODEL = annotate.LAPTOP_MODEL


class Expensive(Exception):
    """A command got as far as its work."""


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


ROW = {"id": "a-0", "split": "judge_train", "instruction": "Say hi.", "kind": "given", "output": "Hi.", "label": 7, "reasoning": "Good.", "cause": None}
LABELS = [ROW, {**ROW, "id": "b-0"}, {**ROW, "id": "c-0", "split": "judge_validation"}, {**ROW, "id": "d-0", "split": "judge_test"}]
PROMPTS = [{"id": "e", "split": "policy_train", "instruction": "Say yes."}, {"id": "f", "split": "policy_test", "instruction": "Say no."}]
JUDGE = {"model": MODEL, "reasoning": False, "lora_rank": 16, "lora_modules": ["q_proj"], "max_thinking": 8, "temperature": 0.0, "max_prompt": 512, "epoch": 1, "adapter": "epoch-1", "validation": {}}
POLICY = {"model": MODEL, "judge": "direct-sft", "lora_rank": 16, "lora_modules": ["q_proj"], "max_prompt": 256, "max_tokens": 8, "temperature": 0.7}
ADAPTER = {"base_model_name_or_path": MODEL, "r": 16}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PAIR = {"prompt": "q", "chosen": TURNS, "rejected": TURNS, "source": "off-policy"}


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run by hand, and beside it a preference file and a folder of nothing."""
    options = {"preset": "laptop", "gold": "oracle", "gold_url": "", "gold_effort": "none"}
    write(tmp_path / "run", {
        "annotations/config.json": {"options": options}, "annotations/labels.json": {}, "annotations/labels.jsonl": jsonl(*LABELS),
        "annotations/instructions.jsonl": jsonl(*PROMPTS),
        "judges/direct-sft/judge.json": JUDGE, "judges/direct-sft/epoch-1/adapter_config.json": ADAPTER,
        "judges/direct-sft/epoch-1/adapter_model.safetensors": b"",
        "policies/direct/policy.json": POLICY, "policies/direct/checkpoints/step-000002/adapter_config.json": ADAPTER,
        "policies/direct/checkpoints/step-000002/adapter_model.safetensors": b"",
    })  # fmt: skip
    write(tmp_path, {"rows.jsonl": jsonl(PAIR), "blocked": b""})
    return tmp_path / "run"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with stub() as url:
        yield url


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def invoke(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str], BaseException | None]:
    """(exit status, lines of error without a usage hint, what else was raised) of a command in this process."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise Expensive

    for module, name in ((annotate, "serve"), (sft, "load_model"), (sft, "on_ranks"), (annotate, "complete")):
        monkeypatch.setattr(module, name, forbidden)
    stage, *words = line.split()
    result = CliRunner().invoke(import_module(STAGES[stage]).app, words)
    lines = [text for text in result.stderr.splitlines() if text.strip() and not text.startswith(("Usage", "Try ")) and "it/s]" not in text]
    error = result.exception if not isinstance(result.exception, SystemExit) else None
    return result.exit_code, lines, error


NEW = "01 --preset laptop --run {tmp}/new"
DIRECT = "02 --run {run} --no-reasoning --name other"
JUDGED = "03 judge --run {run} --judge direct"
PLEASE = "03 policy --run {run} --judge direct --name other"
CHAT = f"{NEW} --data {{tmp}}/rows.jsonl --gold gold --judge-train 1 --judge-validation 0 --judge-test 0 --policy-train 0 --policy-test 0"


def labels(**change: Any) -> dict[str, Any]:
    """The annotations with something else in the second label's record."""
    return {"run/annotations/labels.jsonl": jsonl(LABELS[0], {**LABELS[1], **change}, *LABELS[2:])}


def lines_of_labels(second: bytes) -> dict[str, Any]:
    return {"run/annotations/labels.jsonl": jsonl(LABELS[0]).encode() + second + b"\n" + jsonl(*LABELS[2:]).encode()}


def judge(**change: Any) -> dict[str, Any]:
    return {"run/judges/direct-sft/judge.json": {**JUDGE, **change}}


def adapter(where: str = "judges/direct-sft/epoch-1", **change: Any) -> dict[str, Any]:
    return {f"run/{where}/adapter_config.json": {**ADAPTER, **change}}


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != key}


GONE = None  # as a file's content: the file is removed
LINE2 = ("labels.jsonl, line 2",)
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    # options of stage 1
    (f"{NEW} --judge-train -1", {}, ("--judge-train -1",)),
    (f"{NEW} --judge-train 100000", {}, ("distinct instructions", "lower")),
    (f"{NEW} --threads 0", {}, ("--threads 0", "from 1")),
    (f"{NEW} --threads 1000000", {}, ("--threads 1000000",)),
    (f"{NEW} --outputs 0", {}, ("--outputs 0",)),
    (f"{NEW} --output-tokens -5", {}, ("--output-tokens -5",)),
    (f"{NEW} --gold-tokens 0", {}, ("--gold-tokens 0",)),
    (f"{NEW} --max-chars 0", {}, ("--max-chars 0",)),
    (f"{NEW} --seed -1", {}, ("--seed -1",)),
    (f"{NEW} --gold-effort most", {}, ("--gold-effort most", "low, medium, high")),
    (f"{NEW} --gpus x", {}, ("--gpus x",)),
    (f"{NEW} --gpus 0,,1", {}, ("--gpus 0,,1",)),
    (f"{NEW} --gold-url ftp://x", {}, ("--gold-url ftp://x", "http")),
    (f"{NEW} --policy-model no/such-model", {}, ("no/such-model",)),
    (f"{NEW} --policy-model {{tmp}}/none", {}, ("/none",)),
    (f"{NEW} --data {{tmp}}/rows.jsonl", {}, ("the oracle grades the templates",)),
    ("01 --run {tmp}/new", {}, ("--preset",)),
    ("01 --preset huge --run {tmp}/new", {}, ("huge", "laptop")),
    ("01 --preset laptop", {}, ("--run",)),
    (f"{NEW} --judge-train many", {}, ("--judge-train", "valid")),
    (f"{NEW} --colour red", {}, ("--colour",)),
    ("01 --preset gpu --run {tmp}/new", {}, ("--gpus: GPU 0 is not here", "0")),
    ("01 --preset gpu --run {run}", {}, ("--preset laptop",)),
    ("01 --preset laptop --run {run}", {}, ("data = None", "more", "delete")),
    # folders
    ("01 --preset laptop --run {tmp}/blocked", {}, ("blocked", "--run")),
    ("01 --preset laptop --run {tmp}/blocked/deeper", {}, ("blocked", "--run")),
    ("01 --preset laptop --run /proc/none", {}, ("/proc/none", "--run")),
    ("01 --preset laptop --run /sys/none", {}, ("/sys/none", "--run")),
    ("04 judges --run {run}", {"run/evaluation": b"a file"}, ("evaluation", "--run")),
    # preference data
    (CHAT.replace("rows.jsonl", "none.jsonl") + " --gold-url {url}/0/ok/v1", {}, ("none.jsonl",)),
    (CHAT + " --gold-url {url}/0/ok/v1", {"rows.jsonl": b""}, ("rows.jsonl", "no row")),
    (CHAT + " --gold-url {url}/0/ok/v1", {"rows.jsonl": b"<html>\n"}, ("rows.jsonl, line 1", "not JSON")),
    (CHAT + " --gold-url {url}/0/ok/v1", {"rows.jsonl": b"[1, 2]\n"}, ("rows.jsonl, line 1", "fields")),
    (CHAT + " --gold-url {url}/0/ok/v1", {"rows.jsonl": jsonl(PAIR, without(PAIR, "source"))}, ("rows.jsonl, line 2", "source")),
    (CHAT + " --gold-url {url}/0/ok/v1", {"rows.jsonl": jsonl({**PAIR, "chosen": 5, "rejected": []})}, ("rows.jsonl", "no row")),
    (f"{NEW} --efforts low,most", {}, ("--efforts low,most", "low, medium or high")),
    (f"{NEW} --gold openai/gpt-oss-20b", {}, ("--gold-effort none", "low, medium or high")),
    (CHAT + " --gold-url {url}/0/ok/v1", {"rows.jsonl": b'{"prompt": "\x00"}\n'}, ("rows.jsonl, line 1", "not JSON")),
    (CHAT + " --gold-url {url}/0/ok/v1", {"rows.jsonl": b"\xff\xfe{\x00}\x00\n\x00"}, ("rows.jsonl, line 1", "not JSON")),
    # the gold judge elsewhere
    (CHAT + " --gold-url http://127.0.0.1:9/v1", {}, ("http://127.0.0.1:9/v1", "URL")),
    (CHAT + " --gold-url {url}/0/ok", {"key": b"wrong"}, ("key", "GOLD_API_KEY")),
    (CHAT.replace("--gold gold", "--gold gold-9") + " --gold-url {url}/0/ok/v1", {}, ("gold-9", "but gold")),
    # annotations that stage 2 reads
    (DIRECT, {"run/annotations/labels.json": GONE}, ("labels.json is missing", "01_annotate.py")),
    (DIRECT, {"run/annotations/labels.jsonl": b""}, ("0 examples to train on",)),
    (DIRECT, {"run/annotations/labels.jsonl": GONE}, ("0 examples to train on",)),
    (DIRECT, {"run/annotations/config.json": b"{"}, ("config.json", "Restore")),
    (DIRECT, {"run/annotations/config.json": {"options": {"preset": "huge"}}}, ("config.json", "'huge'")),
    (DIRECT, lines_of_labels(b"not json"), (*LINE2, "not JSON")),
    (DIRECT, lines_of_labels(b""), (*LINE2, "not JSON")),
    (DIRECT, lines_of_labels(b"7"), (*LINE2, "fields")),
    (DIRECT, lines_of_labels(b"[" * 200_000), (*LINE2, "not JSON")),
    (DIRECT, lines_of_labels(b'{"id": "\x00"}'), (*LINE2, "not JSON")),
    (DIRECT, lines_of_labels(b'{"id": "\xe9"}'), (*LINE2, "not JSON")),
    (DIRECT, lines_of_labels(b"x" * 20_000_000), (*LINE2, "not JSON")),
    (DIRECT, {"run/annotations/labels.jsonl": jsonl(LABELS[0], without(LABELS[1], "reasoning"))}, (*LINE2, "reasoning")),
    (DIRECT, labels(label="7"), (*LINE2, "label is '7'")),
    (DIRECT, labels(label=12), (*LINE2, "label is '12'")),
    (DIRECT, labels(label=-1), (*LINE2, "label is '-1'")),
    (DIRECT, labels(label=True), (*LINE2, "label is 'True'")),
    (DIRECT, labels(label=7.5), (*LINE2, "label is '7.5'")),
    (DIRECT, labels(output=None), (*LINE2, "output")),
    (DIRECT, labels(instruction=["x"]), (*LINE2, "instruction")),
    (DIRECT, labels(id="a-0"), (*LINE2, "a-0 stands in line 1")),
    (DIRECT, labels(id={}), (*LINE2, "id is")),
    # options of stage 2
    (f"{DIRECT} --lora-rank 7", {}, ("--lora-rank 7", "8, 16")),
    (f"{DIRECT} --lora-rank 0", {}, ("--lora-rank 0",)),
    (f"{DIRECT} --lora-modules head", {}, ("--lora-modules", "q_proj")),
    (f"{DIRECT} --lr 0", {}, ("--lr 0",)),
    (f"{DIRECT} --lr nan", {}, ("--lr nan",)),
    (f"{DIRECT} --lr inf", {}, ("--lr inf",)),
    (f"{DIRECT} --lr 5", {}, ("--lr 5", "to 1")),
    (f"{DIRECT} --batch 0", {}, ("--batch 0",)),
    (f"{DIRECT} --epochs 0", {}, ("--epochs 0",)),
    (f"{DIRECT} --max-thinking 0", {}, ("--max-thinking 0",)),
    (f"{DIRECT} --max-prompt 0", {}, ("--max-prompt 0",)),
    (f"{DIRECT} --max-prompt 20", {}, ("no example fits --max-prompt 20",)),
    (f"{DIRECT} --temperature 3", {}, ("--temperature 3",)),
    (f"{DIRECT} --tokens-per-pass 0", {}, ("--tokens-per-pass 0",)),
    (f"{DIRECT} --save-every 0", {}, ("--save-every 0",)),
    (f"{DIRECT} --model no/such-model", {}, ("no/such-model",)),
    (f"{DIRECT} --preset node", {}, ("--preset laptop",)),
    (f"{DIRECT} --batch 9", {"run/judges/other-sft/config.json": {"options": {"batch": 8}}, "run/judges/other-sft/metrics.jsonl": b""}, ("begun with batch = 8 (now 9), ",)),
    # judges and options of stage 3
    (f"{JUDGED}s", {}, ("02_train_judge.py",)),
    (JUDGED, {"run/judges/direct-sft/judge.json": b"{'a'}"}, ("judge.json", "Restore")),
    (JUDGED, {"run/judges/direct-sft/judge.json": without(JUDGE, "adapter")}, ("judge.json", "adapter")),
    (JUDGED, {"run/judges/direct-sft/judge.json": b"[]"}, ("judge.json",)),
    (JUDGED, adapter(base_model_name_or_path="Qwen/Qwen3-4B"), ("adapter_config.json", "Qwen/Qwen3-4B")),
    (JUDGED, adapter(r=8), ("adapter_config.json", "rank 8", "rank 16")),
    (JUDGED, {"run/judges/direct-sft/epoch-1/adapter_model.safetensors": GONE}, ("adapter_model.safetensors is missing",)),
    (JUDGED, {"run/judges/direct-sft/epoch-1/adapter_config.json": GONE}, ("adapter_config.json",)),
    (f"{JUDGED} --group 1", {}, ("--group 1", "from 2")),
    (f"{JUDGED} --steps 0", {}, ("--steps 0",)),
    (f"{JUDGED} --prompts 0", {}, ("--prompts 0",)),
    (f"{JUDGED} --minibatches 0", {}, ("--minibatches 0",)),
    (f"{JUDGED} --clip-low 2", {}, ("--clip-low 2",)),
    (f"{JUDGED} --clip-high -1", {}, ("--clip-high -1",)),
    (f"{JUDGED} --temperature 0", {}, ("--temperature 0",)),
    (f"{JUDGED} --std-floor nan", {}, ("--std-floor nan",)),
    (f"{JUDGED} --train-gpus=-1", {}, ("--train-gpus -1",)),
    (f"{JUDGED} --judge-gpus a", {}, ("--judge-gpus a",)),
    (JUDGED, {"run/annotations/labels.jsonl": jsonl({**ROW, "instruction": "word " * 600})}, ("no training prompt",)),
    (f"{PLEASE} --max-tokens 0", {}, ("--max-tokens 0",)),
    (f"{PLEASE} --max-prompt 5", {}, ("no training prompt", "--max-prompt 5")),
    (f"{PLEASE} --beta -1", {}, ("--beta -1",)),
    (f"{PLEASE} --lora-rank 12", {}, ("--lora-rank 12",)),
    (f"{PLEASE} --policy-url there", {}, ("--policy-url there",)),
    (PLEASE, {"run/judges/direct-rl/config.json": b"{}"}, ("not finished",)),
    (PLEASE, {"run/annotations/instructions.jsonl": b'{"id": 1}\n'}, ("instructions.jsonl, line 1",)),
    (PLEASE, {"run/annotations/instructions.jsonl": jsonl(PROMPTS[0], PROMPTS[0])}, ("instructions.jsonl, line 2", "line 1")),
    (PLEASE, {"run/annotations/instructions.jsonl": jsonl({**PROMPTS[0], "instruction": 5})}, ("instructions.jsonl, line 1", "instruction")),
    (f"{PLEASE} --steps 9", {"run/policies/other/config.json": {"options": {"steps": 2}}, "run/policies/other/metrics.jsonl": b""}, ("begun with", "more", "delete")),
    # what stage 4 reads
    ("04 judges --run {run}", {"run/judges/direct-sft/judge.json": GONE}, ("02_train_judge.py",)),
    ("04 judges --run {run}", {"run/judges/direct-sft/judge.json": b""}, ("judge.json",)),
    ("04 judges --run {run}", adapter(r=32), ("rank 32",)),
    ("04 judges --run {run} --threads 0", {}, ("--threads", "1")),
    ("04 judges --run {run}", {"run/evaluation/judges/base.jsonl": b"{}\n"}, ("base.jsonl, line 1",)),
    ("04 gold --run {run}", {"run/policies/direct/policy.json": GONE}, ("03_rl.py policy",)),
    ("04 gold --run {run}", {"run/policies/direct/policy.json": b"nothing"}, ("policy.json", "Restore")),
    ("04 gold --run {run}", {"run/policies/direct/policy.json": without(POLICY, "judge")}, ("policy.json", "judge")),
    ("04 gold --run {run}", adapter("policies/direct/checkpoints/step-000002", r=64), ("step-000002", "rank 64")),
    ("04 gold --run {run}", {"run/evaluation/outputs.jsonl": jsonl({"id": "x"}, {"id": "x"})}, ("outputs.jsonl, line 2",)),
]  # fmt: skip


@pytest.mark.parametrize(("line", "damage", "words"), CASES, ids=[f"{n}: {line.format(run='RUN', tmp='TMP', url='URL')}" for n, (line, _, _) in enumerate(CASES)])
def test_bad_input(run: Path, server: str, monkeypatch: pytest.MonkeyPatch, line: str, damage: dict[str, Any], words: tuple[str, ...]) -> None:
    tmp = run.parent
    monkeypatch.setenv("GOLD_API_KEY", "wrong" if damage.get("key") else "secret")
    write(tmp, {name: content for name, content in damage.items() if content is not GONE and name != "key"})
    for name, content in damage.items():
        if content is GONE:
            (tmp / name).unlink()
    before = snapshot(tmp)
    status, lines, error = invoke(line.format(run=run, tmp=tmp, url=server), monkeypatch)
    assert error is None, f"a traceback: {error!r}"
    text = "\n".join(lines)
    assert status != 0 and all(word in text for word in words), text
    assert len([part for part in lines if set(part) - set("╭─╮│╰╯ Error") and "it/s" not in part]) <= 2 and len(text) < 700, text
    after = snapshot(tmp)
    assert {name: after.get(name) for name in before} == before, "something was overwritten"
    assert {Path(name).name for name in after.keys() - before.keys()} <= {"config.json"}


@pytest.mark.parametrize("line", [NEW, CHAT + " --gold-url {url}/0/ok/v1", DIRECT, JUDGED, PLEASE, "04 judges --run {run}", "04 gold --run {run}"])
def test_good_input_gets_to_work(run: Path, server: str, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """So that the cases above fail for their own reason."""
    monkeypatch.setenv("GOLD_API_KEY", "secret")
    status, lines, error = invoke(line.format(run=run, tmp=run.parent, url=server), monkeypatch)
    assert isinstance(error, Expensive), (status, lines, error)


def test_more_fields_than_needed_do_no_harm(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run.parent, labels(colour="red", more=[1, {"x": None}]))
    assert isinstance(invoke(DIRECT.format(run=run), monkeypatch)[2], Expensive)


def test_a_stage_that_made_nothing_may_begin_again_with_other_options(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong model name is found after config.json is written; the right one must not be refused."""
    assert invoke(f"{DIRECT} --model no/such-model".format(run=run), monkeypatch)[0] == 1
    assert isinstance(invoke(DIRECT.format(run=run), monkeypatch)[2], Expensive)
    assert json.loads((run / "judges/other-sft/config.json").read_text())["options"]["model"] == MODEL


def test_unwritable_folder(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if os.getuid() == 0:  # permissions do not bind root
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    else:
        (run / "judges").chmod(0o500)
    status, lines, error = invoke(DIRECT.format(run=run), monkeypatch)
    assert status == 1 and error is None and "can not be" in lines[-1]


def test_a_prompt_over_the_context_is_unusable_not_fatal(server: str) -> None:
    endpoint = annotate.Endpoint(f"{server}/0/long/v1", "secret", "gold")
    assert annotate.gold_by_chat(endpoint, "x", "y", 8, "none") == {"label": None, "reasoning": "", "cause": "prompt too long"}


# --- as a user runs it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("01_annotate.py --preset laptop --run {tmp}/new --threads 0", "--threads 0"),
        ("02_train_judge.py --run {tmp}/new --reasoning", "01_annotate.py"),
        ("03_rl.py policy --run {run} --judge direct --lora-rank 7", "--lora-rank 7"),
        ("04_evaluate.py gold --run {run} --threads -1", "threads"),
    ],
)
def test_exit_status_and_terminal(run: Path, line: str, words: str) -> None:
    result = command(line.format(run=run, tmp=run.parent))
    assert result.returncode in (1, 2) and words in result.stderr and "Traceback" not in result.stderr + result.stdout


def test_two_at_once(run: Path) -> None:
    """The second command on a stage's folder says who holds it, and ends; after a kill -9 the folder is free."""
    hold = "import sys, time; sys.path.insert(0, '.'); from importlib import import_module; from pathlib import Path\n"
    hold += "import_module('01_annotate').lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    folder = run / "judges" / "other-sft"
    first = subprocess.Popen([sys.executable, "-c", hold, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        line = f"02_train_judge.py --run {run} --no-reasoning --name other --model no/such-model"
        result = command(line)
        assert result.returncode == 1 and str(folder) in result.stderr and f"process {first.pid}" in result.stderr
        assert not list(folder.iterdir()), "the second command has written something"
        first.kill()
        first.wait()
        assert "no/such-model" in command(line).stderr
    finally:
        first.kill()


def pairs(number: int) -> str:
    rows = []
    for i in range(number):
        turns = [[{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"{word} answer."}] for word in ("A", "Another")]
        rows.append({"prompt": f"Question {i}?", "chosen": turns[0], "rejected": turns[1], "source": "off-policy" if i < number - 10 else "on"})
    return jsonl(*rows)


SIZES = "--judge-train 80 --judge-validation 10 --judge-test 10 --policy-train 5 --policy-test 5"
# A server counts as hung after four seconds here, not five minutes.
QUICK = "import sys; sys.path.insert(0, '.'); from importlib import import_module; a = import_module('01_annotate'); a.PATIENCE = 4.0; a.start(a.app)"


def annotate_at(url: str, folder: Path) -> subprocess.Popen[str]:
    words = f"--preset laptop --run {folder}/run --data {folder}/pairs.jsonl --gold gold --gold-url {url}/v1 --threads 8 {SIZES}".split()
    environment = {**os.environ, "GOLD_API_KEY": "secret"}
    return subprocess.Popen([sys.executable, "-c", QUICK, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("mode", "words"), [("500", "engine died"), ("garbage", "not an answer"), ("shape", "not an answer"), ("drop", "isconnected"), ("hang", "not answered for 4 seconds")])
def test_a_server_that_fails_in_mid_run(server: str, tmp_path: Path, mode: str, words: str) -> None:
    """One clear error that names the server; what it answered is kept; with a sound server the same run goes on."""
    write(tmp_path, {"pairs.jsonl": pairs(110)})
    _, error = (process := annotate_at(f"{server}/60/{mode}", tmp_path)).communicate(timeout=300)
    assert process.returncode == 1 and words in error and f"{server}/60/{mode}" in error and "Traceback" not in error
    assert error.count("error:") == 1 and "the same command goes on" in error
    kept = annotate.read_jsonl(tmp_path / "run/annotations/labels.jsonl", ["id", "label"])
    assert 30 <= len(kept) <= 60
    (tmp_path / "run/annotations/config.json").write_text((tmp_path / "run/annotations/config.json").read_text().replace(f"60/{mode}", "0/ok"))
    _, error = (process := annotate_at(f"{server}/0/ok", tmp_path)).communicate(timeout=300)
    assert process.returncode == 0, error
    whole = annotate.read_jsonl(tmp_path / "run/annotations/labels.jsonl", ["id", "label"])
    assert whole[: len(kept)] == kept and len(whole) == 200 and all(row["label"] is not None for row in whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_command_at_once(server: str, tmp_path: Path, number: signal.Signals) -> None:
    """Also while all its threads wait for a server; the run goes on later."""
    write(tmp_path, {"pairs.jsonl": pairs(110)})
    process = annotate_at(f"{server}/{40 + number}/minute", tmp_path)  # the stub counts by path: each test one of its own
    path = tmp_path / "run/annotations/labels.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 40:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    began = time.perf_counter()
    _, error = process.communicate(timeout=50)
    assert time.perf_counter() - began < 40, "it waited for the requests in flight"
    assert process.returncode == 128 + number
    assert "the same command goes on" in error and "Traceback" not in error
    assert len(annotate.read_jsonl(path, ["id", "label"])) >= 40


def test_a_full_disk(server: str, tmp_path: Path) -> None:
    """One clear error; after space is made the same command goes on, and every record is there once."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk here")
    try:
        write(disk, {"pairs.jsonl": pairs(110)})
        _, error = (process := annotate_at(f"{server}/0/ok", disk)).communicate(timeout=300)
        assert process.returncode == 1 and "No space left" in error and "Traceback" not in error and error.count("error:") == 1
        kept = (disk / "run/annotations/labels.jsonl").read_bytes().count(b"\n")
        assert 0 < kept < 200
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        output, error = (process := annotate_at(f"{server}/0/ok", disk)).communicate(timeout=300)
        assert process.returncode == 0, output + error
        assert len({row["id"] for row in annotate.read_jsonl(disk / "run/annotations/labels.jsonl", ["id"])}) == 200
    finally:
        subprocess.run(["umount", str(disk)], check=True)
