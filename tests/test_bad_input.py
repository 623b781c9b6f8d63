"""Common kinds of bad input end a command with a line or two that name them, before any work."""

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import annotate, command, rl, sft
from stub import stub
from test_annotate import OFF, ON, row
from typer.testing import CliRunner

STAGES = {"01": annotate, "02": sft, "03": rl}
MODEL, EPOCH = annotate.LAPTOP_MODEL, "judges/direct-sft/epoch-1"
LABELS, JUDGE_FILE = "annotations/labels.jsonl", "judges/direct-sft/judge.json"
LABEL = {
    "id": "a",
    "split": "judge_train",
    "instruction": "Say hi.",
    "output": "Hi.",
    "label": 7,
    "reasoning": "",
}
JUDGE = {"model": MODEL, "reasoning": False, "lora_rank": 16, "lora_modules": ["q_proj"], "max_thinking": 8}
GOLD = {"preset": "laptop", "gold": "oracle", "gold_url": "", "gold_effort": "none"}
FILES = {
    "annotations/config.json": {"options": GOLD},
    "annotations/labels.json": {},
    LABELS: [LABEL, {**LABEL, "id": "b"}, {**LABEL, "id": "c", "split": "judge_validation"}],
    "annotations/instructions.jsonl": [{"id": "e", "split": "policy_train", "instruction": "Say yes."}],
    JUDGE_FILE: {**JUDGE, "temperature": 0.0, "max_prompt": 512, "adapter": "epoch-1"},
    f"{EPOCH}/adapter_config.json": {"base_model_name_or_path": MODEL, "r": 16},
    f"{EPOCH}/adapter_model.safetensors": b"",
    "rows.jsonl": [row(f"Question {n}?", "A", "B", OFF if n < 9 else ON) for n in range(12)],
}


def write(run: Path, files: dict[str, Any]) -> None:
    """Files as bytes, a list of records, or JSON; None: such a file is removed."""
    for name, content in files.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        records = content if isinstance(content, list) else [content]
        text = "" if isinstance(content, bytes) else "".join(json.dumps(record) + "\n" for record in records)
        path.write_bytes(content if isinstance(content, bytes) else text.encode())
        if content is None:
            path.unlink()


NEW = "01 --preset laptop --run {run}/new"
SMALL = "--judge-train 4 --judge-validation 2 --judge-test 2 --policy-test 2 --gold gold"
CHAT = f"{NEW} {SMALL} --data {{run}}/rows.jsonl --gold-url {{url}}/0/ok/v1"
DIRECT = "02 --run {run} --no-reasoning --name other"
JUDGED = "03 judge --run {run} --judge direct"
PLEASE = "03 policy --run {run} --judge direct --name other"
OTHER_GOLD = {"annotations/config.json": {"options": {**GOLD, "gold": "m"}}}
ORACLE = f"--gold oracle --data template --policy-model {MODEL}"
BEGUN = {"annotations/config.json": {"options": GOLD}}
OTHER_BASE = {f"{EPOCH}/adapter_config.json": {"base_model_name_or_path": "Qwen/Qwen3-4B", "r": 16}}
CASES: list[tuple[str, dict[str, Any], str]] = [
    # (command, files that are other than in FILES, words of the error; "key" is the key for the server)
    # a missing stage, or part of one
    ("02 --run {run}/new --reasoning", {}, "01_annotate.py --preset"),
    (DIRECT, {"annotations/labels.json": None}, "labels.json is missing|01_annotate.py --run"),
    (DIRECT.replace("no-", "") + " --effort low", {}, "labels-low.json is missing|--efforts low"),
    (PLEASE.replace("direct", "reasoning"), {}, "02_train_judge.py"),
    (PLEASE, {"judges/direct-rl/config.json": {}}, "03_rl.py judge"),
    # wrong URL, key, model
    (CHAT.replace("{url}", "http://127.0.0.1:9"), {}, "http://127.0.0.1:9/0/ok/v1"),
    (CHAT, {"key": "wrong"}, "GOLD_API_KEY"),
    (CHAT, {"key": " "}, "GOLD_API_KEY is empty"),  # fault F6
    (CHAT, {"key": "secret\r"}, "GOLD_API_KEY holds a character"),
    (CHAT, {"key": "schlüssel"}, "GOLD_API_KEY holds a character"),
    (NEW + " --policy-model no/such-model", {}, "no/such-model"),
    # not JSON, missing columns
    (CHAT, {"rows.jsonl": b"<html>\n<p>"}, "rows.jsonl, line 1|not JSON"),
    (CHAT, {"rows.jsonl": [{"prompt": "x"}]}, "rows.jsonl, line 1|chosen"),
    (DIRECT, {LABELS: json.dumps(LABEL).encode() + b"\nnot json\n{}\n"}, "labels.jsonl, line 2|not JSON"),
    (DIRECT, {LABELS: b""}, "0 examples to train on"),
    (DIRECT, {"annotations/config.json": b"{"}, "config.json|Restore"),
    (JUDGED, {JUDGE_FILE: b"{'a'}"}, "judge.json|Restore"),
    (PLEASE, {"annotations/instructions.jsonl": [{"id": 1}]}, "instructions.jsonl, line 1"),
    # an adapter of another base or rank, or none
    (JUDGED, OTHER_BASE, f"adapter_config.json|{MODEL}"),
    (JUDGED, {f"{EPOCH}/adapter_model.safetensors": None}, "no adapter_model.safetensors"),
    (PLEASE, {f"{EPOCH}/adapter_config.json": {"base_model_name_or_path": MODEL, "r": 8}}, "rank 16"),
    # options out of range, or against each other
    (NEW + " --judge-train 100000", {}, "distinct instructions"),
    (NEW + " --gold-effort most", {}, "--gold-effort"),
    (NEW + " --efforts low,most", {}, "--efforts low,most"),
    (NEW + " --data {run}/rows.jsonl", {}, "the oracle"),
    (DIRECT + " --lora-rank 7", {}, "--lora-rank"),
    (DIRECT + " --lr nan", {}, "--lr"),
    (DIRECT + " --max-prompt 4096 --max-thinking 4096", {}, "8192"),  # fault 6
    (DIRECT + " --model no/such-model", {}, "no/such-model"),
    (JUDGED + " --group 1", {}, "--group"),
    (JUDGED + " --beta 0.1", {}, "--beta"),  # fault 9
    (PLEASE + " --temperature 0", {}, "--temperature"),
    (PLEASE + " --opponents 3", {}, "--opponents"),
    (PLEASE + " --max-prompt 5", {}, "no prompt"),
    (PLEASE + " --max-prompt 8000 --max-tokens 200", {}, "8192"),
    (PLEASE.replace("direct", "truth"), OTHER_GOLD, "truth"),
    # changed options on resume
    (DIRECT, {"judges/other-sft/config.json": {"options": {"batch": 9}}, "judges/other-sft/x": {}}, "= 9"),
    (PLEASE, {"policies/other/config.json": {"options": {"steps": 2}}, "policies/other/x": {}}, "steps = 2"),
    (f"01 --preset node {ORACLE} --run {{run}}", BEGUN, "preset = 'laptop'"),
    # F21: a name is one folder's; F24: a variable of the shell that is not set
    (DIRECT.replace("other", "a/b"), {}, "--name|letters"),
    (DIRECT.replace("other", ".."), {}, "--name"),
    (PLEASE.replace("other", "a/b"), {}, "--name"),
    (PLEASE.replace("other", "base"), {}, "--name|not 'base'"),
    (JUDGED + " --name a:1", {}, "--name"),
    ("02 --run= --no-reasoning", {}, "an empty path"),
]  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Any:
    with stub() as found:
        yield found


def invoke(line: str, run: Path, url: str, files: dict[str, Any], patch: pytest.MonkeyPatch) -> Any:
    """What a command says to `files`, in this process, with servers, models and requests forbidden."""
    write(run, FILES | {name: content for name, content in files.items() if name != "key"})
    patch.setenv("GOLD_API_KEY", files.get("key", "secret"))
    for module, name in ((annotate, "serve"), (annotate, "map_to_jsonl"), (sft, "load_training")):
        patch.setattr(module, name, lambda *_, **__: pytest.fail("the work has begun"))
    stage, *words = line.format(run=run, url=url).split()
    return CliRunner().invoke(STAGES[stage].app, words)


@pytest.mark.parametrize(("line", "files", "words"), CASES)
def test_bad_input(line: str, files: Any, words: str, tmp_path: Path, url: str, monkeypatch: Any) -> None:
    result = invoke(line, tmp_path, url, files, monkeypatch)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
    text = " ".join(result.stderr.replace("│", " ").split())
    assert all(word in text for word in words.split("|")), text
    assert len(text) < 800 and len(result.stderr.splitlines()) < 8, text
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - {
        tmp_path / name for name in {**FILES, **files}
    }
    assert {path.name for path in made} <= {"config.json", ".lock", "instructions.jsonl", "outputs.jsonl"}


@pytest.mark.parametrize("line", [CHAT, DIRECT, JUDGED, PLEASE])
def test_good_input_gets_to_work(line: str, tmp_path: Path, url: str, monkeypatch: Any) -> None:
    """So that the cases above end for their own reason."""
    with pytest.raises(pytest.fail.Exception, match="the work has begun"):
        result = invoke(line, tmp_path, url, {}, monkeypatch)
        raise result.exception or AssertionError(result.output)


@pytest.mark.parametrize("stage", ["01", "05"])
def test_a_password_in_a_url_is_not_told(stage: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Fault F6: neither printed nor written, and nobody is asked; nor with an empty key."""
    attacks, bodies = import_module("05_attack_analysis"), []
    with stub(bodies) as url:
        told = url.replace("//", "//me:geheim@")
        for key, place, words in (("secret", told, "password"), ("", url, "is empty")):
            monkeypatch.setenv("JUDGE_API_KEY", key)
            line = CHAT.format(run=tmp_path, url=place).split()[1:]
            if stage == "05":
                line = f"battery --judge-url {place}/0/ok/v1 --judge-model gold --out {tmp_path}/b".split()
            write(tmp_path, FILES)
            monkeypatch.setenv("GOLD_API_KEY", key)
            result = CliRunner().invoke((annotate if stage == "01" else attacks).app, line)
            assert result.exit_code == 1 and words in result.stderr and result.stderr.count("\n") == 1
            assert "geheim" not in result.output
    assert not bodies and not any(b"geheim" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_base_model_without_chat_template_is_refused(
    tmp_path: Path, monkeypatch: Any, tokenizer: Any
) -> None:
    """Fault F17: by 01 in one line, not by 03 after 01 and 02; gold's too, where it is served by us."""
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    base.save_pretrained(tmp_path / "base")
    chat = CHAT.replace(" --gold-url {url}/0/ok/v1", "").replace("--gold gold", "--gold {run}/base")
    for line in (f"{NEW} --policy-model {{run}}/base", chat):
        result = invoke(line, tmp_path, "", {}, monkeypatch)
        assert result.exit_code == 1 and f"{tmp_path}/base has no chat template" in result.stderr
        assert result.stderr.count("\n") == 1 and not (tmp_path / "new").exists()


def test_as_a_user_sees_it(tmp_path: Path) -> None:
    """Exit status, one line, no traceback; R17: a policy that can not be loaded costs nothing."""
    result = command(f"01_annotate.py --preset laptop --policy-model 01_annotate.py --run {tmp_path}/new")
    assert result.returncode == 1 and "01_annotate.py" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
