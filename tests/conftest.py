"""Shared fixtures. Tests run from the repository's root; every request goes to 127.0.0.1."""

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real data; tests that use it skip where it is absent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)
os.environ.setdefault("TQDM_MININTERVAL", "30")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every script and server compiles its packages anew

annotate = import_module("01_annotate")
annotate.load_tokenizer = functools.cache(annotate.load_tokenizer)
sft = import_module("02_train_judge")
rl = import_module("03_rl")


two_ranks = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks want two GPUs, or a CPU")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return annotate.load_tokenizer(annotate.LAPTOP_MODEL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One live vLLM server for all tests of a module that only ask it; in float32, on a GPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ARGS", "--dtype float32")
        lora = {"rank": 16, "count": 2, "modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
        with annotate.serve(annotate.LAPTOP_MODEL, tmp_path_factory.mktemp("logs"), 512, **lora) as endpoint:
            yield endpoint


def command(line: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a stage as a user does; its output comes back as text."""
    return subprocess.run([sys.executable, *line.split()], cwd=ROOT, capture_output=True, text=True, **more)


def processes_naming(text: str) -> list[int]:
    """Ids of the living processes with `text` in their command line (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended while we looked
            if text in path.read_bytes().decode(errors="replace") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """Ids of the living processes below `pid`, the nearest first (Linux)."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, level = [], [pid]
    while level := [child for child, parent in parents.items() if parent in level]:
        found += level
    return found


def living(pid: int) -> bool:
    """Whether there is such a process (a zombie is none)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def ended(pids: list[int], within: float = 20) -> bool:
    """Whether all these processes end in so many seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end and any(map(living, pids)):
        time.sleep(0.2)
    return not any(map(living, pids))
