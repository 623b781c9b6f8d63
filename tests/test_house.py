"""The house: sizes and layout of the scripts, and what all stages share: files, options, the terminal."""

import ast
import gzip
import os
import re
import resource
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from conftest import ROOT
from typer.testing import CliRunner

annotate, evaluate = import_module("01_annotate"), import_module("04_evaluate")
sft, rl = import_module("02_train_judge"), import_module("03_rl")

SCRIPTS = sorted(ROOT.glob("0*.py"))


@pytest.mark.skipif(not find_spec("ruff"), reason="ruff is not installed")
@pytest.mark.parametrize("rule", ["format --check", "check"])
def test_ruff_finds_nothing(rule: str) -> None:
    line = [sys.executable, "-m", "ruff", *rule.split(), "--no-cache", *SCRIPTS]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert not [path.name for path in SCRIPTS if "fmt: off" in path.read_text()]


def test_both_stacks_hold_what_is_imported() -> None:
    """Fault R1: what the scripts import from outside, and what converts the laptop's model (gguf)."""
    imported = {"gguf", "ruff", "pytest", "hypothesis"}
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported |= {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    # What comes through those named.
    through = {"filelock", "numpy", "jinja2", "pandas", "safetensors", "huggingface_hub", "httpx2"}
    for name in ("requirements.txt", "requirements-cpu.txt"):
        text = (ROOT / name).read_text()
        assert {
            p for p in imported - through if not any(line.startswith(p) for line in text.splitlines())
        } == set()


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "number"),
    [(b"", 2), (b'{"id": 3}\n', 3), (b'{"id": 3}', 3), (b'{"id": "\xc3', 2), (b'{"id": 3', 2), (b"\n\n", 2)],
)
def test_a_reader_never_changes_a_file(tmp_path: Path, tail: bytes, number: int) -> None:
    """Fault 1: a whole last line counts with or without its newline, half of one is left out."""
    path, text = tmp_path / "x.jsonl", b'{"id": 1}\n{"id": 2}\n' + tail
    path.write_bytes(text)
    assert [r["id"] for r in annotate.read_jsonl(path, ["id"])] == [1, 2, 3][:number]
    assert path.read_bytes() == text and annotate.read_jsonl(tmp_path / "none.jsonl") == []


def test_other_peoples_lines(tmp_path: Path, capsys: Any) -> None:
    """F22: half an emoji is read; what is no text, and what is packed, is refused with file and line."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "\\ud83d!", "b": "\\u00e9\\uD83D\\uDE00"}\n')
    assert annotate.read_jsonl(path, texts=["a", "b"]) == [{"a": "?!", "b": "é😀"}]
    for value in (b"null", b"7", b'["x"]'):
        path.write_bytes(b'{"a": "x"}\n{"a": ' + value + b"}\n")
        with pytest.raises(SystemExit):
            annotate.read_jsonl(path, texts=["a"])
        assert f"{path}, line 2: no text in a" in capsys.readouterr().err
    path.write_bytes(gzip.compress(b'{"a": "x"}\n'))
    with pytest.raises(SystemExit):
        annotate.read_jsonl(path)
    assert f"{path}, line 1" in capsys.readouterr().err


@pytest.mark.parametrize("before", [b"", b'{"id": 1}\n'])
@pytest.mark.parametrize("half", [b"{", b'{"id": 2, "te', b'{"id": 2}'])
def test_after_a_full_disk_a_record_has_a_line_of_its_own(tmp_path: Path, before: bytes, half: bytes) -> None:
    """F25: half a line, which an append left there, takes no other record with it."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(before + half)
    for number in (3, 4):
        annotate.append_jsonl(path, {"id": number})
    assert path.read_bytes() == before + b'{"id": 3}\n{"id": 4}\n'


def test_a_full_disk(tmp_path: Path) -> None:
    """F25, as the system says it: a write that gets half through, in one of several threads."""
    path, no_more = tmp_path / "x.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    annotate.append_jsonl(path, {"id": "1"})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, no_more))
    try:
        with pytest.raises(OSError):
            annotate.append_jsonl(path, {"id": "2", "text": "x" * 99})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (no_more, no_more))
        signal.signal(signal.SIGXFSZ, before)
    records = annotate.map_to_jsonl(path, dict.fromkeys("1234"), lambda _: {"text": "y" * 99}, "test", 4)
    assert len(records) == 4 == len(annotate.read_jsonl(path)) and records[0] == {"id": "1"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """F23: a file that lies elsewhere is written there."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "x.jsonl").symlink_to("disk/y.jsonl")
    for _ in range(2):
        annotate.write_jsonl(tmp_path / "x.jsonl", [{"id": 1}])
    assert (tmp_path / "x.jsonl").is_symlink() and annotate.read_jsonl(tmp_path / "disk/y.jsonl")


DAMAGES = [b"not json", b"[1]", b'{"a": 1}', b"{}", b"7", b"null", b'{"id": "\xe9"}', b"[" * 200_000]


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_other_damage_is_named(tmp_path: Path, capsys: Any, damage: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": 1}\n' + damage + b'\n{"id": 3}\n')
    with pytest.raises(SystemExit):
        annotate.read_jsonl(path, ["id"])
    assert f"{path}, line 2" in capsys.readouterr().err


def test_map_to_jsonl_resumes(tmp_path: Path) -> None:
    """In the order of the tasks, each once; half a line of its own file is made again."""
    path, seen = tmp_path / "x.jsonl", []

    def work(task: int) -> dict[str, int]:
        if task == 7 and len(seen) < 12:
            raise RuntimeError("the server is gone")
        seen.append(task)
        return {"square": task * task}

    tasks = {str(i): i for i in range(20)}
    with pytest.raises(RuntimeError):
        annotate.map_to_jsonl(path, tasks, work, "test", threads=2)
    time.sleep(0.1)  # of two threads the other may be in the middle of one
    assert len(annotate.read_jsonl(path)) == len(seen) >= 6, "what has been answered is kept"
    path.write_bytes(path.read_bytes() + b'{"id": "19", "squ')
    seen += [-1] * 20
    records = annotate.map_to_jsonl(path, tasks, work, "test", threads=2)
    assert records == [{"id": str(i), "square": i * i} for i in range(20)]
    assert sorted(r["id"] for r in annotate.read_jsonl(path)) == sorted(tasks)


def test_only_where_all_is_refused_nothing_is_kept(tmp_path: Path, capsys: Any) -> None:
    path, no = tmp_path / "x.jsonl", "refused (400): no"
    some = {str(i): no if i == 2 else None for i in range(4)}
    assert len(annotate.map_to_jsonl(path, some, lambda cause: {"cause": cause}, "test", 2)) == 4
    with pytest.raises(SystemExit):
        annotate.map_to_jsonl(path, {"8": 1, "9": 1}, lambda _: {"cause": no}, "test", 2)
    assert no in capsys.readouterr().err
    assert sorted(r["id"] for r in annotate.read_jsonl(path)) == ["0", "1", "2", "3"]


def test_where_the_server_failed_it_is_asked_again(tmp_path: Path) -> None:
    path, tasks = tmp_path / "x.jsonl", {str(i): i for i in range(4)}
    causes = {1: "no answer: Error code: 503", 2: "refused (400): no"}
    annotate.map_to_jsonl(path, tasks, lambda i: {"cause": causes.get(i)}, "test", 2)
    records = annotate.map_to_jsonl(path, tasks, lambda i: {"cause": f"again {i}"}, "test", 2)
    assert [record["cause"] for record in records] == [None, "again 1", causes[2], None]
    assert len(annotate.read_jsonl(path)) == 4


HOLD = """
import sys, time
from importlib import import_module
from pathlib import Path
import_module("01_annotate").record_config(Path(sys.argv[1]), {"lr": 0.1})
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_has_one_user_and_one_set_of_options(tmp_path: Path, capsys: Any) -> None:
    """The second user is told so; kill -9 frees the folder; other options are refused once work began."""
    options, folder = {"lr": 0.1, "threads": 8, "modules": ["a", "b"]}, tmp_path / "judge"
    line = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(SystemExit):
            annotate.record_config(folder, options)
        assert f"{folder} is in use" in capsys.readouterr().err
        first.kill()
    annotate.record_config(
        folder, {**options, "modules": ("a", "b")}
    )  # nothing is made yet: others may be used
    assert annotate.read_options(folder) == options
    (folder / "metrics.jsonl").touch()
    annotate.record_config(folder, {**options, "threads": 9})
    assert annotate.read_options(folder)["threads"] == 9, "later stages read where gold runs now"
    with pytest.raises(SystemExit):
        annotate.record_config(folder, {**options, "lr": 0.2})
    message = capsys.readouterr().err
    assert "lr = 0.1" in message and "threads" not in message and str(folder) in message


# --- options and the terminal --------------------------------------------------------------------


def test_presets(tmp_path: Path, monkeypatch: Any) -> None:
    """The command line goes before the preset, the preset before the laptop's values; a run remembers it."""
    option = annotate.run_option({"gpu": {"steps": 20, "gpus": "1"}, "node": {"steps": 30}})
    app = typer.Typer(pretty_exceptions_enable=False)

    def main(run, steps: int = 10, gpus: str = "0") -> None:  # noqa: ANN001
        print(steps, gpus)

    main.__annotations__["run"] = Annotated[Path | None, option]
    main.__defaults__ = (None, 10, "0")
    app.command()(main)

    def said(line: str) -> str:
        return CliRunner().invoke(app, f"{line} --run {tmp_path}".split()).output

    assert "01_annotate.py --preset laptop" in said("") and CliRunner().invoke(app, []).output == "10 0\n"
    for preset, found in {"laptop": "10 0", "gpu": "20 1", "node": "30 0"}.items():
        annotate.write_json(tmp_path / "annotations/config.json", {"options": {"preset": preset}})
        assert said("") == f"{found}\n" and said("--steps 5") == f"5 {found[-1]}\n"
    for name, values in evaluate.SERVING.items():  # stages 4 and 5 ask as many at once as stage 1
        assert values == {key: annotate.PRESETS[name][key] for key in values}
    monkeypatch.setenv("HOME", str(tmp_path.parent))  # F24: bash does not expand --run=~/x
    assert CliRunner().invoke(app, [f"--run=~/{tmp_path.name}"]).output == "30 0\n"
    result = CliRunner().invoke(app, ["--run", ""])
    assert result.exit_code and "an empty path" in result.output


def test_the_preset_of_stage_1(tmp_path: Path, monkeypatch: Any) -> None:
    """It stands beside the options in which it differs from the laptop's values, in any order."""
    monkeypatch.setattr(annotate, "check_chat_model", lambda _: None)
    recorded: list[Any] = []
    monkeypatch.setattr(annotate, "record_config", lambda folder, options: recorded.append(options) or 1 / 0)
    for line in ("--seed 3 --preset gpu --threads 7", "--threads 7 --preset gpu --seed 3"):
        CliRunner().invoke(annotate.app, f"{line} --run {tmp_path} --pairs".split())
    CliRunner().invoke(annotate.app, f"--run {tmp_path}".split())
    gpu, same, laptop = recorded
    assert gpu == same and not {"run", "efforts", "rubrics", "pairs"} & gpu.keys()
    assert {**gpu, **annotate.PRESETS["gpu"]} == {**gpu, "threads": 256} and gpu["preset"] == "gpu"
    assert (gpu["seed"], gpu["threads"], laptop["threads"], laptop["preset"]) == (3, 7, 64, "laptop")


def test_one_server_plays_judge_and_policy_of_the_gpu_preset() -> None:
    """24 GB hold one base model, a trainer beside it; gold has the card to itself, in stages of its own."""
    models = {annotate.PRESETS["gpu"]["policy_model"], sft.PRESETS["gpu"]["model"]}
    assert models | {rl.POLICY_PRESETS["gpu"]["model"]} == {annotate.SMALL_MODEL}
    for table in (annotate.PRESETS, sft.PRESETS, rl.POLICY_PRESETS, rl.JUDGE_PRESETS, evaluate.SERVING):
        assert not [key for key in table["gpu"] if key.endswith("gpus")]  # one card for all
    node = annotate.PRESETS["node"]
    assert (node["gpus"].count(",") + 1) / node["gold_gpus_each"] == 4


@pytest.mark.parametrize(
    ("mask", "gpus", "taken"), [("2,3", "0", "2"), ("GPU-ab, 7", "0,1", "GPU-ab,7"), ("", "1", "1")]
)
def test_gpus_are_counted_among_the_visible_ones(
    monkeypatch: Any, mask: str, gpus: str, taken: str, capsys: Any
) -> None:
    """Fault 4: an entry of the mask that the job inherited. R2: a CUDA build without a GPU is not a CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert annotate.pick_gpus(gpus) == taken.split(",")
    for wrong in ("2", "0,,1", "x", "-1"):
        with pytest.raises(SystemExit):
            annotate.pick_gpus(wrong)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(SystemExit):
        annotate.pick_gpus("0")
    message = capsys.readouterr().err
    assert "13.0" in message and "requirements-cpu.txt" in message


def test_each_replica_gets_its_entry_of_the_mask(tmp_path: Path, monkeypatch: Any) -> None:
    """Fault 4, in the environment of a real process; VLLM_ARGS come last, so that they count."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "GPU $CUDA_VISIBLE_DEVICES" "$@"\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(annotate, "load_tokenizer", str)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-ab,MIG-cd")
    monkeypatch.setenv("VLLM_ARGS", "--max-num-seqs 64")

    def said(_: Any) -> int:
        logs = [path.read_text() for path in sorted(tmp_path.glob("logs/*"))]
        if all(logs):
            texts.extend(logs)
            return 200
        return 0

    texts: list[str] = []
    monkeypatch.setattr(annotate.Endpoint, "status", said)
    with annotate.serve("some/model", tmp_path / "logs", 64, "2,1") as endpoint:
        assert endpoint.url.count("/v1") == 2 and endpoint.tokenizer == "some/model"
    assert {text.split()[1] for text in texts} == {"MIG-cd", "GPU-ab"}
    assert all(re.search(r"--max-num-seqs 64 --port \d+\n", text) for text in texts)
    assert all("--tensor-parallel-size 1 " in text for text in texts)


def test_a_replica_may_take_several_gpus(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """gpt-oss-120b: four cards are two replicas; three are refused; on a CPU there is nothing to share."""
    started: list[Any] = []

    class Process:
        pid, poll, terminate, wait = 2**22 + 1, lambda _: None, lambda _: None, lambda *_: 0

        def __init__(self, command: Any, **how: Any) -> None:
            started.append((" ".join(command), how["env"].get("CUDA_VISIBLE_DEVICES")))

    monkeypatch.setattr(annotate.subprocess, "Popen", Process)
    monkeypatch.setattr(annotate.os, "killpg", lambda *_: None)
    monkeypatch.setattr(annotate.Endpoint, "status", lambda _: 200)
    monkeypatch.setattr(annotate, "load_tokenizer", str)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gold = {"gold": "some/model", "gold_url": "", "gpus": "0,1,2,3", "max_chars": 9, "gold_tokens": 9}
    gold |= {"gold_flags": "--max-num-seqs 32", "gold_gpus_each": 2}
    monkeypatch.setattr(annotate, "context_length", lambda _: 4096)

    def serve() -> Any:
        started.clear()
        with annotate.gold_endpoint(gold, tmp_path):
            return [(gpus, "-tensor-parallel-size 2 " in line) for line, gpus in started]

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 8)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert serve() == [("0,1", True), ("2,3", True)]
        assert all("--max-num-seqs 32" in line for line, _ in started)
        gold["gpus"] = "0,1,2"
        with pytest.raises(SystemExit):
            serve()
        assert "2 a replica" in capsys.readouterr().err and not started
    assert [tensor for _, tensor in serve()] == [False] * 3


@pytest.mark.parametrize("deep", [False, True])
def test_a_server_leaves_no_temporary_files(tmp_path: Path, monkeypatch: Any, deep: bool) -> None:
    """Faults F14, F16: a folder of its own, gone with it, where paths of sockets fit; NO_PROXY stays."""
    folder = tmp_path / ("deep" * 20) if deep else Path("/tmp")
    folder.mkdir(exist_ok=True)
    program = tmp_path / "python"
    says = '#!/bin/sh\ntouch "$TMPDIR/socket"\necho "$TMPDIR $NO_PROXY $no_proxy."\nexec sleep 60\n'
    program.write_text(says)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(annotate.tempfile, "tempdir", str(folder))
    monkeypatch.setattr(annotate, "load_tokenizer", str)
    monkeypatch.setenv("NO_PROXY", "my.host")
    monkeypatch.delenv("no_proxy", raising=False)
    said = lambda _: 200 * any(path.read_text() for path in tmp_path.glob("logs/*"))  # noqa: E731
    monkeypatch.setattr(annotate.Endpoint, "status", said)
    with annotate.serve("some/model", tmp_path / "logs", 64):
        (log,) = tmp_path.glob("logs/*")
        scratch, theirs, forced = log.read_text().split(" ")
        assert (theirs, forced) == ("my.host", ".\n") and "no_proxy" not in os.environ
        assert (Path(scratch) / "socket").exists() and len(f"{scratch}/{'u' * 36}") <= 103
        assert Path(scratch).parent == Path("/tmp")
    assert not Path(scratch).exists()


TERMINAL = """
import resource, sys
from importlib import import_module
stages = [import_module(name) for name in ("01_annotate", "02_train_judge", "03_rl")]
slow = [name for name in ("vllm", "datasets") if name in sys.modules]
app = stages[0].typer.Typer()
@app.command()
def main():
    print("a \u2014 b", resource.getrlimit(resource.RLIMIT_NOFILE)[0], slow)
stages[0].start(app)
"""


def test_a_poor_terminal_few_open_files_and_quick_help() -> None:
    """Faults 13 and R3: a print ends no command, the limit of files is raised; help imports nothing slow."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))

    how = {"env": {**os.environ, "PYTHONIOENCODING": "latin-1"}, "preexec_fn": lower, "cwd": ROOT}
    result = subprocess.run([sys.executable, "-c", TERMINAL], capture_output=True, text=True, **how)
    assert result.stdout == f"a ? b {most} []\n", result.stderr
