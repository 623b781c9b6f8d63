"""A course made of this repository: cut the students' copy from it, and grade what comes back.

    python tests/course.py handout OUT [PROBLEM …]      a copy in which students write the functions
    python tests/course.py grade [PROBLEM …]            points for this copy: students check their own work
    python tests/course.py grade --submission DIR --seed 17 --json results.json          as the teacher does

The problems are described in tests/course/PROBLEMS.md; teachers read tests/course/README.md. A problem is a
list of tests, and gives its points if all of them pass. Each is graded alone, in a process of its own: with
our tests, and with our version of all that belongs to other problems.

This is a grader and no sandbox. Code of students runs with your rights: use a container for strangers.
"""

import argparse
import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
SHIPPED_RUN = ROOT / "results" / "demo"
ALL_TOGETHER, ONE_PROBLEM = 570, 120  # seconds that grading may take: --limit for a slow machine
# What does not belong in a handout: what is made anew, and what would give the answers away.
LEFT_OUT = [".git", ".venv", "models", "runs", "__pycache__", ".*_cache", ".hypothesis"]
LEFT_OUT += ["mutations.py", "test_course.py"]
FOR_TEACHERS = "tests/course/README.md"


@dataclass
class Problem:
    """Its tests, by pytest's names, and the functions that a student writes: script -> names."""

    name: str
    points: int
    tests: list[str]
    write: dict[str, list[str]] = field(default_factory=dict)


def tests(names: str, file: str = "course/test_fill_in") -> list[str]:
    return [f"tests/{file}.py::test_{name}" for name in names.split()]


RL, SFT, ANNOTATE, FROZEN = "test_rl", "test_train_judge", "test_annotate", "test_frozen"
PACKED = "packed_equals_unpacked a_shared_prompt_is_paid_for_once"
UPDATED = "update_is_the_gradient_of_eq_2 a_server_with_other_weights_ends_the_training"
PROBLEMS = [
    Problem("expected_score", 4, tests("expected_score"), {"02": ["expected_score"]}),
    Problem(
        "rewards",
        6,
        tests("verifiable_rewards") + tests("reading_a_whole_judgement", RL),
        {"03": ["verifiable_reward", "pairwise_verifiable_reward", "read_score"]},
    ),
    Problem(
        "advantages",
        6,
        tests("advantages_of_a_group_in_part") + tests("advantages", RL),
        {"03": ["group_advantages"]},
    ),
    Problem("loss", 10, tests("loss_is_eq_2") + tests("frozen[loss]", FROZEN), {"03": ["grpo_loss"]}),
    Problem(
        "normaliser", 14, tests("normaliser_is_that_of_all_ranks") + tests(UPDATED, RL), {"03": ["update"]}
    ),
    Problem("pack", 10, tests("pack_by_hand") + tests(PACKED, SFT), {"02": ["build_pack", "pack"]}),
    Problem(
        "alpha",
        5,
        tests("alpha_of_published_ratings") + tests("frozen[alpha]", FROZEN),
        {"02": ["krippendorff_alpha"]},
    ),
    Problem(
        "delimiter",
        5,
        tests("no_text_gets_out no_text_ends_the_turn")
        + tests("an_output_can_not_close_its_block", ANNOTATE),
        {"01": ["fill_case", "escape_special_tokens"]},
    ),
]
HANDED_IN = {"ratio": 6, "floor": 6, "token_mean": 6, "kl": 6, "old_logprobs": 6}  # predict, then run
HANDED_IN |= {"honest": 15, "rare": 15, "survivor": 15, "length": 15}  # experiments
PROBLEMS += [
    Problem(name, points, tests(name, "course/test_handed_in")) for name, points in HANDED_IN.items()
]

# --- Cutting --------------------------------------------------------------------------------------


def find(source: str, name: str) -> tuple[int, int, Any]:
    """(first line, line after the last, definition) of the function `name`; lines count from 0."""
    found = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name]
    if not found:
        raise LookupError(f"no function {name}")
    node = found[-1]  # the one that counts
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno or 0, node


def without_body(source: str, name: str, number: int) -> str:
    """`source` with the function `name` to be written; its signature, decorators and docstring stay."""
    _, end, node = find(source, name)
    lines, first = source.split("\n"), node.body[0]
    begin = first.lineno - 1 if ast.get_docstring(node) is None else first.end_lineno
    lines[begin:end] = [f'    raise NotImplementedError("problem {number}")']
    return "\n".join(lines)


def with_function(source: str, name: str, other: str) -> str:
    """`source` with the function `name` as `other` has it."""
    begin, end, _ = find(other, name)
    lines, definition = source.split("\n"), other.split("\n")[begin:end]
    try:
        begin, end, _ = find(source, name)
    except LookupError:  # deleted
        begin = end = len(lines)
    lines[begin:end] = definition
    return "\n".join(lines)


def script_path(number: str) -> Path:
    (path,) = ROOT.glob(f"{number}_*.py")
    return path


def handout(out: Path, names: list[str]) -> None:
    """Write the students' copy to the new folder `out`, where the problems `names` are left to be solved."""
    if out.exists() or out.resolve().is_relative_to(ROOT):
        sys.exit(f"error: {out} must be a new folder, outside of {ROOT}")
    shutil.copytree(ROOT, out, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (out / FOR_TEACHERS).unlink(missing_ok=True)
    for number, problem in enumerate(PROBLEMS, 1):
        for script, functions in problem.write.items() if problem.name in names else ():
            path = out / script_path(script).name
            for name in functions:
                path.write_text(without_body(path.read_text("utf-8"), name, number), "utf-8")
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    print(
        f"{out}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB. Students begin with tests/course/PROBLEMS.md"
    )


# --- Grading --------------------------------------------------------------------------------------


def assemble(problem: Problem, submission: Path, copy: Path) -> None:
    """Fill the folder `copy` with our scripts and tests, and what the student wrote for this problem."""
    for path in ROOT.glob("0*"):
        shutil.copy(path, copy)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "models").symlink_to(ROOT / "models")
    for script in problem.write:
        path = script_path(script)
        ours, theirs = path.read_text("utf-8"), (submission / path.name).read_text("utf-8")
        for other in PROBLEMS:
            for name in other.write.get(script, []) if other is not problem else []:
                theirs = with_function(theirs, name, ours)
        (copy / path.name).write_text(theirs, "utf-8")


def complaint(problem: Problem, submission: Path, seed: str, limit: float) -> str | None:
    """Run the tests of `problem` for at most `limit` seconds: why it gives no points, None if it does."""
    if not problem.write and not (submission / "handin" / problem.name).is_dir():
        return f"nothing was handed in: there is no folder handin/{problem.name}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy, log, report = Path(folder) / "copy", Path(folder) / "log", Path(folder) / "report.xml"
        copy.mkdir()
        try:
            assemble(problem, submission, copy)
        except (OSError, ValueError, SyntaxError, LookupError, RecursionError) as error:
            return f"no test was run: {type(error).__name__}: {error}"
        command = [sys.executable, "-m", "pytest", *"-q --tb=short -W ignore -p no:cacheprovider".split()]
        command += [f"--junitxml={report}", *problem.tests]
        about = {"COURSE_HANDIN": f"{submission}/handin", "COURSE_RUN": f"{SHIPPED_RUN}", "COURSE_SEED": seed}
        with log.open("wb") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "start_new_session": True}
            process = subprocess.Popen(command, cwd=copy, env={**os.environ, **about}, **streams)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                said = log.read_text("utf-8", "replace")[-1000:]
                slow = "no test had ended: an endless loop, or a busy machine (--limit)"
                return f"ended after {limit:.0f} seconds; {said or slow}"
            finally:  # with all that it has started
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        said = log.read_text("utf-8", "replace")[-4000:]
        try:
            cases = list(ElementTree.parse(report).iter("testcase"))
        except (OSError, ElementTree.ParseError):
            return f"the process ended before its tests did, with exit status {status}\n{said}"
        passed = {case.attrib["name"].partition("[")[0] for case in cases if not len(case)}
        wanted = {test.rpartition("::")[2].partition("[")[0] for test in problem.tests}
        return None if status == 0 and wanted <= passed else said


def grade(
    names: list[str],
    submission: Path,
    seed: str = "",
    seconds: float = ALL_TOGETHER,
    one: float = ONE_PROBLEM,
) -> Any:
    """Grade the problems `names`, in at most so many seconds; the content of Gradescope's results.json."""
    began, tests = time.monotonic(), []
    for problem in [problem for problem in PROBLEMS if problem.name in names]:
        limit = min(one, began + seconds - time.monotonic())
        why = complaint(problem, submission.resolve(), seed, limit) if limit > 0 else "no time was left"
        score = 0 if why else problem.points
        about = {"name": problem.name, "score": score, "max_score": problem.points}
        tests.append({**about, "output": why or "All tests passed."})
        print(f"{problem.name:>15} {score:3} of {problem.points}", flush=True)
    print(f"{'together':>15} {sum(t['score'] for t in tests):3} of {sum(t['max_score'] for t in tests)}")
    return {"tests": tests, "execution_time": round(time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cut, check = commands.add_parser("handout"), commands.add_parser("grade")
    cut.add_argument("out", type=Path, help="A new folder.")
    check.add_argument("--submission", type=Path, default=ROOT, help="A student's copy. Default: this one.")
    check.add_argument("--seed", default="", help="That this student was given. Default: any will do.")
    check.add_argument("--limit", type=float, default=ONE_PROBLEM, help="Seconds for one problem.")
    check.add_argument("--json", type=Path, help="Write Gradescope's results.json here.")
    for command in (cut, check):
        command.add_argument("problems", nargs="*", metavar="PROBLEM", help="Default: all.")
    options = parser.parse_args()
    names = options.problems or [problem.name for problem in PROBLEMS]
    if unknown := set(names) - {problem.name for problem in PROBLEMS}:
        parser.error(f"no problem named {', '.join(sorted(unknown))}")
    if options.command == "handout":
        return handout(options.out, names)
    results = grade(names, options.submission, options.seed, one=options.limit)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    else:
        print(*(f"\n--- {t['name']}: {t['output']}" for t in results["tests"] if not t["score"]), sep="\n")


if __name__ == "__main__":
    main()
