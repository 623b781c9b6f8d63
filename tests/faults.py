"""kill -9 at random moments of real commands: what is lost, comes twice, is damaged, or stays behind.

    python tests/faults.py --kills 50 --json OUT.json    # about 40 minutes on two cores
    python tests/faults.py --kills 3 --stage battery     # the kills only where a command has this word

Every command of test_commands.py runs once, uninterrupted; then again from the same beginning, killed at
moments drawn from the whole span that it took, start-up included, until it is done. Both must then hold the
same files and the same ids in every JSONL, each once. Exit status 1 if anything is lost, twice or damaged.
(Servers that fail: test_annotate.py, test_commands.py.)
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, descendants, living
from test_commands import COMMANDS, RUN, annotate

WORK = Path("runs/faults")


def start(line: str, run: Path) -> subprocess.Popen[bytes]:
    """A command on `run`; its output goes to RUN.log."""
    words = line.replace(str(RUN), str(run)).split()
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )


def finish(line: str, run: Path) -> float:
    """Run a command to its end; seconds. An error ends this program."""
    began, process = time.perf_counter(), start(line, run)
    if process.wait():
        text = run.with_suffix(".log").read_text(errors="replace")
        sys.exit(f"{line}: exit status {process.returncode}\n{text[-2000:]}")
    return time.perf_counter() - began


def kill(process: subprocess.Popen[bytes]) -> int:
    """kill -9 for the command alone; how many of its processes outlive it by 20 seconds."""
    process.send_signal(19)  # stopped first, so that it starts no other meanwhile
    ours = descendants(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(map(living, ours)):
        time.sleep(0.1)
    left = [pid for pid in ours if living(pid)]
    for pid in left:
        subprocess.run(["kill", "-9", str(pid)], capture_output=True)
    return len(left)


def records(path: Path) -> tuple[Counter[str], int]:
    """(how often each id, or step, comes; lines that are no record) of a JSONL file."""
    ids, damaged = Counter(), 0
    for number, line in enumerate(filter(None, path.read_bytes().split(b"\n")), 1):
        try:
            record = json.loads(line)
            ids[str(record.get("id", record.get("step", f"line {number}")))] += 1
        except (ValueError, AttributeError):
            damaged += 1
    return ids, damaged


def sound(path: Path) -> bool:
    """Whether a file can be read as what it is."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
    except (ValueError, RuntimeError, OSError):
        return False
    return True


def compare(whole: Path, killed: Path) -> Counter[str]:
    """What `killed` lacks, has twice, or has damaged, against `whole`."""
    one, other = ({p.relative_to(run) for p in run.rglob("*") if p.is_file()} for run in (whole, killed))
    one, other = ({p for p in paths if "logs" not in p.parts} for paths in (one, other))
    found = Counter(lost=len(one - other), left_over_files=len(other - one))
    for path in one & other:
        change = Counter(damaged=not sound(killed / path))
        if path.suffix == ".jsonl":
            (wanted, _), (ids, damaged) = records(whole / path), records(killed / path)
            change.update(damaged=damaged)
            # Ids of scores are hashes of outputs, sampled anew; `04 gold` ends only with all of them.
            if not path.parent.match("evaluation/scores"):
                change.update(lost=len(wanted - ids), added=len(ids.keys() - wanted.keys()))
                wanted_once = Counter({key: max(1, wanted[key]) for key in ids})  # a base output, by policy
                change.update(duplicated=(ids - wanted_once).total())
            else:
                change.update(duplicated=ids.total() - len(ids))
        found.update(change)
        if change.total():
            print(f"  {path}: {dict(change)}", flush=True)
    for path in one ^ other:
        print(f"  only in the {'whole' if path in one else 'killed'} run: {path}", flush=True)
    return found


def kills(number: int, word: str, seed: int) -> Counter[str]:
    """Every command once without a fault; those with `word` again from the same beginning, with kills."""
    shutil.rmtree(WORK, ignore_errors=True)
    whole, before, killed = (WORK / name for name in ("whole", "before", "killed"))
    before.mkdir(parents=True)
    rng, found = random.Random(seed), Counter(kills=0, lost=0, duplicated=0, damaged=0, servers_left=0)
    chosen = [line for line in COMMANDS if word in line]
    for line in COMMANDS:
        span, index = finish(line, whole), chosen.index(line) if line in chosen else -1
        left = number * (index + 1) // len(chosen) - number * index // len(chosen) if index >= 0 else 0
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(before, killed)
        while left:
            process = start(line, killed)
            try:
                status = process.wait(timeout=rng.uniform(0, span))
            except subprocess.TimeoutExpired:
                found.update(kills=1, servers_left=kill(process))
                left -= 1
                continue
            found.update(failed=status != 0)
            shutil.rmtree(killed)  # done before the moment came: once more from where the command began
            shutil.copytree(before, killed)
        if index >= 0:
            seconds = finish(line, killed)
            print(
                f"{span:6.1f} s whole, {seconds:6.1f} s to the end after the kills: {line[:90]}", flush=True
            )
            found.update(compare(whole, killed))
        shutil.rmtree(before)
        shutil.copytree(whole, before)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--stage", default="", help="kill only commands with this word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    result = dict(kills(asked.kills, asked.stage, asked.seed))
    print(json.dumps(result, indent=1))
    if asked.json:
        annotate.write_json(asked.json, result)
    shutil.rmtree(WORK, ignore_errors=True)
    sys.exit(sum(value for key, value in result.items() if key != "kills") > 0)
