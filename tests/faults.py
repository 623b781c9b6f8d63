"""Real faults against real commands: what is lost, what comes twice, what is damaged, what stays behind.

    python tests/faults.py --kills 50 --json OUT.json    # SIGKILL at random moments, about 40 minutes on two cores
    python tests/faults.py --kills 3 --stage battery     # the kills only where a command has this word
    python tests/faults.py --signals --json OUT.json     # SIGINT, SIGTERM, a full disk, a server killed and hung

--kills: every stage at its smallest size, first uninterrupted; then again from the same beginning,
killed at moments drawn from the whole span that the stage took, start-up included, and started again
until it is done. Both must then hold the same files, the same ids in every JSONL, each once, and the
same last state of every adapter. Exit status 1 if anything is lost, twice, damaged or left behind.
(Servers that answer 500, garbage, slowly or never, in seconds: tests/test_bad_input.py.)
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, descendants
from test_commands import COMMANDS, RUN, annotate

WORK = Path("runs/faults")
STAGES = COMMANDS[:-1]  # the summary only prints


# ---------------------------------------------------------------------------------------------
# Commands and what they leave behind.
# ---------------------------------------------------------------------------------------------


def start(line: str, run: Path, **patches: float) -> subprocess.Popen[bytes]:
    """A stage's command on `run`, its output in WORK/RUN.log; `patches` change constants of 01."""
    script, *words = line.replace(str(RUN), str(run)).split()
    program = ["import sys; sys.path.insert(0, '.')", "from importlib import import_module", "a = import_module('01_annotate')"]
    program += [f"a.{name} = {value}" for name, value in patches.items()]
    program += [f"stage = import_module('{script.removesuffix('.py')}')", f"sys.argv[0] = '{script}'", "a.start(stage.app)"]
    command = [sys.executable, script] if not patches else [sys.executable, "-c", "; ".join(program)]
    with log_of(run).open("ab") as log:
        return subprocess.Popen([*command, *words], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def log_of(run: Path) -> Path:
    return WORK / f"{run.name}.log"


def finish(line: str, run: Path) -> float:
    """Run the command to its end; seconds. An error ends this program."""
    began = time.perf_counter()
    process = start(line, run)
    if process.wait():
        sys.exit(f"{line}: exit status {process.returncode}. The end of {log_of(run)}:\n{tail(run)}")
    return time.perf_counter() - began


def tail(run: Path) -> str:
    return "\n".join(log_of(run).read_text(errors="replace").splitlines()[-15:])


def servers_of(process: subprocess.Popen[bytes]) -> tuple[set[int], set[int]]:
    """(process groups, ports) of the servers below a command."""
    groups, ports = set(), set()
    for pid in descendants(process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            group = os.getpgid(pid)
        except OSError:  # it ended while we looked
            continue
        if group != process.pid:
            groups.add(group)
        if b"--port" in words:
            ports.add(int(words[words.index(b"--port") + 1]))
    return groups, ports


def members(group: int) -> list[int]:
    """The living processes of a group (a zombie does not live)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def left_behind(groups: set[int], ports: set[int], patience: float) -> int:
    """Servers that still live, or ports that are still held, after `patience` seconds; ends them."""
    end = time.monotonic() + patience
    while time.monotonic() < end and any(members(group) for group in groups):
        time.sleep(0.1)
    left = [group for group in groups if members(group)]
    for group in left:
        os.killpg(group, signal.SIGKILL)
    held = 0
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections may linger
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                held += 1
    return max(len(left), held)


def kill(process: subprocess.Popen[bytes]) -> int:
    """kill -9 for the command alone; how many of its servers outlive it. Stopped first, so that none is missed."""
    process.send_signal(signal.SIGSTOP)
    groups, ports = servers_of(process)
    process.kill()
    process.wait()
    return left_behind(groups, ports, patience=20)


# ---------------------------------------------------------------------------------------------
# Comparing two runs.
# ---------------------------------------------------------------------------------------------


def records(path: Path) -> tuple[Counter[str], int]:
    """(how often each id, or step, comes; lines that are no record) of a JSONL file."""
    ids: Counter[str] = Counter()
    damaged = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line:
                record = json.loads(line)
                ids[str(record.get("id", record.get("step", f"line {number}")))] += 1
        except (ValueError, AttributeError):
            damaged += 1
    return ids, damaged


def files(run: Path) -> set[Path]:
    return {p.relative_to(run) for p in run.rglob("*") if p.is_file() and "logs" not in p.relative_to(run).parts}


def compare(whole: Path, killed: Path) -> Counter[str]:
    """What `killed` lacks, has twice, or has damaged, against `whole`."""
    found: Counter[str] = Counter()
    lost_files, more = files(whole) - files(killed), files(killed) - files(whole)
    found["lost"] += len(lost_files)
    found["left_over_files"] += len(more)
    for path in sorted(lost_files | more):
        print(f"  only in the {'whole' if path in lost_files else 'killed'} run: {path}")
    for path in sorted(files(whole) & files(killed)):
        if path.suffix == ".jsonl":
            wanted, _ = records(whole / path)
            ids, damaged = records(killed / path)
            change = {"lost": len(wanted - ids), "added": len(ids.keys() - wanted.keys()), "duplicated": sum(n - 1 for n in ids.values()), "damaged": damaged}
            found.update(change)
            if any(change.values()):
                print(f"  {path}: {change}")
        elif path.suffix == ".json":
            try:
                one, other = json.loads((whole / path).read_bytes()), json.loads((killed / path).read_bytes())
            except ValueError:
                found["damaged"] += 1
                continue
            if path.name == "judge.json" and one.get("steps") != other.get("steps"):
                found["other_step"] += 1
        elif path.name == "optimizer.safetensors":  # empty where every group was flat, as chance will have it
            load_file(killed / path)
        elif path.suffix == ".safetensors" and (whole / path).stat().st_size != (killed / path).stat().st_size:
            found["damaged"] += 1
            print(f"  {path}: another size")
    return found


# ---------------------------------------------------------------------------------------------
# Kills.
# ---------------------------------------------------------------------------------------------


def kills(number: int, word: str, seed: int) -> dict[str, int]:
    """Every stage once without a fault; those with `word`, from the same beginning, killed again and again until done."""
    shutil.rmtree(WORK, ignore_errors=True)
    whole, before, killed = (WORK / name for name in ("whole", "before", "killed"))
    before.mkdir(parents=True)
    rng, found = random.Random(seed), Counter(kills=0, lost=0, duplicated=0, damaged=0, servers_left=0)
    chosen = [line for line in STAGES if word in line]
    for line in STAGES:
        span = finish(line, whole)
        if line not in chosen:
            shutil.rmtree(before)
            shutil.copytree(whole, before)
            continue
        index = chosen.index(line)
        share = number * (index + 1) // len(chosen) - number * index // len(chosen)
        done = 0
        shutil.copytree(before, killed, dirs_exist_ok=True)
        while done < share:
            process = start(line, killed)
            try:
                process.wait(timeout=rng.uniform(0, span))
            except subprocess.TimeoutExpired:
                found["servers_left"] += kill(process)
                done += 1
                continue
            if process.returncode:
                found["failed"] += 1
                print(f"  exit status {process.returncode} after a kill:\n{tail(killed)}", flush=True)
            # It got done before the moment came: once more from where the stage began.
            shutil.rmtree(killed, ignore_errors=True)
            shutil.copytree(before, killed)
        seconds = finish(line, killed)
        found["kills"] += done
        print(f"{span:6.1f} s whole; {done} kills, then done in {seconds:5.1f} s: {line.replace(f' --run {RUN}', '')[:90]}", flush=True)
        found.update(compare(whole, killed))
        shutil.rmtree(killed)
        shutil.rmtree(before)
        shutil.copytree(whole, before)
    return dict(found)


# ---------------------------------------------------------------------------------------------
# Signals, a full disk, a server that dies or hangs.
# ---------------------------------------------------------------------------------------------

SAMPLING = f"01_annotate.py --preset laptop --run {RUN} --judge-train 40 --judge-validation 3 --judge-test 4 --policy-train 6 --policy-test 3 --outputs 1 --output-tokens 16 --threads 4"


def until(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    while not ready():
        if process.poll() is not None:
            sys.exit(f"the command ended too early, with {process.returncode}")
        time.sleep(0.05)


def sampled(run: Path) -> int:
    path = run / "annotations" / "candidates.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def fault(name: str, act: Callable[[subprocess.Popen[bytes]], None], statuses: set[int], after: int, **patches: float) -> dict[str, object]:
    """Let `act` happen to a command (before its server is up, or after `after` records); then go on to the end."""
    run = WORK / name.replace(" ", "-")
    shutil.rmtree(run, ignore_errors=True)
    log_of(run).unlink(missing_ok=True)
    process = start(SAMPLING, run, **patches)
    until(process, lambda: sampled(run) >= after if after else bool(servers_of(process)[1]))
    groups, ports = servers_of(process)
    kept, began = sampled(run), time.perf_counter()
    act(process)
    status = process.wait(timeout=120)
    seconds = time.perf_counter() - began
    left = left_behind(groups, ports, patience=1)
    log = log_of(run).read_text(errors="replace")
    finish(SAMPLING, run)
    ids, damaged = records(run / "annotations" / "labels.jsonl")
    result = {
        "status": status, "seconds": round(seconds, 1), "servers_left": left, "kept": kept, "lost": 47 - len(ids), "duplicated": sum(ids.values()) - len(ids),
        "damaged": damaged, "traceback": "Traceback" in log, "says": [text for text in log.splitlines() if "the same command goes on" in text][-1:],
    }  # fmt: skip
    result["ok"] = status in statuses and not (left or result["lost"] or result["duplicated"] or damaged or result["traceback"])
    print(f"{name}: {json.dumps(result)}", flush=True)
    return result


def server_processes(process: subprocess.Popen[bytes]) -> list[int]:
    """The processes of the command's servers, without the watchdogs (the groups' leaders)."""
    return [pid for group in servers_of(process)[0] for pid in members(group) if pid != group]


def strike(number: signal.Signals) -> Callable[[subprocess.Popen[bytes]], None]:
    return lambda process: [os.kill(pid, number) for pid in server_processes(process)]  # type: ignore[return-value]


def full_disk() -> dict[str, object]:
    """Fine-tuning on a disk that has no room for an adapter and its optimiser's state; then it gets some."""
    disk = WORK / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True).returncode:
        print("full disk: skipped, only root can mount a small disk here")
        return {"skipped": True, "ok": True}
    run = disk / "run"
    try:
        finish(STAGES[0], run)
        process = start(STAGES[1], run)
        status = process.wait()
        log = log_of(run).read_text(errors="replace")
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        finish(STAGES[1], run)
        ids, damaged = records(run / "judges/direct-sft/metrics.jsonl")
        result = {"status": status, "traceback": "Traceback" in log, "says": [t for t in log.splitlines() if "No space" in t][-1:], "steps": len(ids), "damaged": damaged}
        result["ok"] = status == 1 and bool(result["says"]) and not result["traceback"] and not damaged
        print(f"full disk: {json.dumps(result)}", flush=True)
        return result
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def signals() -> dict[str, object]:
    WORK.mkdir(parents=True, exist_ok=True)
    return {
        "SIGINT while starting": fault("SIGINT while starting", lambda p: p.send_signal(signal.SIGINT), {130}, after=0),
        "SIGINT": fault("SIGINT", lambda p: p.send_signal(signal.SIGINT), {130}, after=5),
        "SIGTERM": fault("SIGTERM", lambda p: p.send_signal(signal.SIGTERM), {143}, after=5),
        "server killed": fault("server killed", strike(signal.SIGKILL), {1}, after=5),
        "server hung": fault("server hung", strike(signal.SIGSTOP), {1}, after=5, PATIENCE=8.0),
        "full disk": full_disk(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--stage", default="", help="kill only commands with this word")
    parser.add_argument("--signals", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    result: dict[str, object] = dict(kills(chosen.kills, chosen.stage, chosen.seed)) if chosen.kills else {}
    if chosen.signals:
        result["signals"] = signals()
    print(json.dumps(result, indent=1))
    if chosen.json:
        annotate.write_json(chosen.json, result)
    shutil.rmtree(WORK, ignore_errors=True)
    bad = sum(int(str(value)) for key, value in result.items() if key not in ("kills", "signals"))
    sys.exit(bool(bad) or any(not row["ok"] for row in result.get("signals", {}).values()))  # type: ignore[attr-defined]
