"""Stage 1 under load: many records against a fast fake gold judge on loopback.

    python tests/test_load.py 100000     # by hand, some minutes; prints what was measured
    python -m pytest tests/test_load.py  # the same with 3,000 records

Measured: records a second, the memory of the command while it labels, the time that a killed
command needs until it labels again, and that the labels do not depend on the order of answers.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT
from stub import stub

annotate = import_module("01_annotate")


def text(number: int, words: int = 150) -> str:
    """About a kilobyte that differs from record to record, in length too."""
    return " ".join(f"w{(number * 7919 + i * 31) % 9973}" for i in range(words + number % 10))


def write_pairs(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for i in range(rows + 2):
            turns = [[{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": text(2 * i + k)}] for k in (0, 1)]
            source = "off-policy" if i < rows else "other"
            file.write(json.dumps({"prompt": f"Question {i}?", "chosen": turns[0], "rejected": turns[1], "source": source}) + "\n")


def start(folder: Path, url: str, rows: int) -> subprocess.Popen[bytes]:
    sizes = f"--judge-train {rows - 20} --judge-validation 10 --judge-test 10 --policy-train 1 --policy-test 1 --threads 64"
    words = f"01_annotate.py --preset laptop --run {folder}/run --data {folder}/pairs.jsonl --gold gold --gold-url {url}/0/ok/v1 {sizes}"
    environment = {**os.environ, "GOLD_API_KEY": "secret", "TQDM_DISABLE": "1"}
    return subprocess.Popen([sys.executable, *words.split()], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def megabytes(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 24), b""))


def follow(process: subprocess.Popen[bytes], path: Path, until: int, began: float) -> list[tuple[float, int, float]]:
    """(seconds, records, megabytes) now and then, until there are `until` records or the command has ended."""
    seen = []
    pause = 0.2
    while process.poll() is None and (not seen or seen[-1][1] < until):
        seen.append((time.perf_counter() - began, lines(path), megabytes(process.pid)))
        time.sleep(pause)
        pause = min(2.0, pause * 1.1)
    return seen


def load(folder: Path, records: int) -> dict[str, Any]:
    """Label `records` outputs, with a kill -9 at half of them."""
    write_pairs(folder / "pairs.jsonl", records // 2)
    path = folder / "run/annotations/labels.jsonl"
    with stub() as url:
        began = time.perf_counter()
        process = start(folder, url, records // 2)
        first = follow(process, path, records // 2, began)
        process.kill()
        process.wait()
        left = lines(path)
        began = time.perf_counter()
        process = start(folder, url, records // 2)
        while lines(path) <= left and process.poll() is None:
            time.sleep(0.1)
        resumed = time.perf_counter() - began
        second = follow(process, path, records, began)
        assert process.wait() == 0
    found = {}
    wrong = 0
    for _, row in annotate.scan_jsonl(path, ["id", "label"]):
        content = annotate.judge_messages(row["instruction"], row["output"])[1]["content"]
        wrong += row["label"] != len(content) % 10
        found[row["id"]] = row["label"]
    working = [point for point in second if point[1] > left]
    rate = (working[-1][1] - working[0][1]) / (working[-1][0] - working[0][0])
    quarter = working[len(working) // 4]
    return {
        "records": len(found), "wrong": wrong, "per_second": round(rate), "seconds_to_resume": round(resumed, 1),
        "seconds_to_first": round(next(s for s, n, _ in first if n), 1),
        "megabytes_early": round(quarter[2]), "megabytes_late": round(max(m for _, _, m in working[-max(1, len(working) // 4) :])),
        "megabytes_of_labels": round(path.stat().st_size / 1e6),
    }  # fmt: skip


def test_load(tmp_path: Path) -> None:
    result = load(tmp_path, 3000)
    assert result["records"] == 3000 and result["wrong"] == 0
    assert result["seconds_to_resume"] < 60  # 2 on an idle machine
    assert result["megabytes_late"] - result["megabytes_early"] < 20


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(load(Path(name), int(sys.argv[1]))))
