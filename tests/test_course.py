"""The course: the handout is cut, its tests fail on it and on wrong solutions, the grader survives students.

All but one call of the grader runs in this process, where the scripts are imported already.
"""

import ast
import contextlib
import io
import json
import math
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import course
import pytest
from _pytest.runner import runtestprotocol
from conftest import ROOT, annotate, rl, sft
from test_docs import command_lines, parse

sys.path.insert(0, str(ROOT / "tests" / "course"))
handed_in = import_module("test_handed_in")
ATTACKS = import_module("05_attack_analysis").ATTACKS
SCRIPTS = {"01": annotate, "02": sft, "03": rl}
TO_WRITE = [problem for problem in course.PROBLEMS if problem.write]


# --- Wrong solutions: none gives a point ----------------------------------------------------------


def mutated(script: str, name: str, before: str, after: str) -> Callable[..., Any]:
    """The function `name` of a script with `after` in place of `before`."""
    module = SCRIPTS[script]
    source = course.script_path(script).read_text("utf-8")
    begin, end, _ = course.find(source, name)
    text = "\n".join(source.split("\n")[begin:end])
    assert text.count(before) == 1, f"{before!r} does not stand once in {name}"
    namespace = {**vars(module)}
    exec(
        compile("from __future__ import annotations\n" + text.replace(before, after), name, "exec"), namespace
    )
    return namespace[name]


# As they are in the project; the tests call what stands in the modules.
group_advantages, grpo_loss, alpha = rl.group_advantages, rl.grpo_loss, sft.krippendorff_alpha
escape, fill_case = annotate.escape_special_tokens, annotate.fill_case


def sample_std(rewards_G: Sequence[float | None], floor: float, scale: bool = True) -> list[float]:
    known = [r for r in rewards_G if r is not None]
    spread = max(stdev(known) if len(known) > 1 else 0, floor) if scale else 1
    return [0.0 if r is None or not spread else (r - fmean(known)) / spread for r in rewards_G]


def floor_added(rewards_G: Sequence[float | None], floor: float, scale: bool = True) -> list[float]:
    known = [r for r in rewards_G if r is not None]
    spread = (pstdev(known) + floor if known else 0) if scale else 1
    return [0.0 if r is None or not spread else (r - fmean(known)) / spread for r in rewards_G]


def missing_is_zero(rewards_G: Sequence[float | None], floor: float, scale: bool = True) -> list[float]:
    return group_advantages([r or 0.0 for r in rewards_G], floor, scale)


def missing_detach(
    new_A: Any, old_A: Any, a_A: Any, w_A: Any, clip: Any, beta: float = 0, ref_A: Any = None
) -> Any:
    """The old log-probabilities are taken for a function of the weights: new - old has no gradient."""
    return grpo_loss(new_A, old_A + new_A - new_A.detach(), a_A, w_A, clip, beta, ref_A)


def mean_of_the_part(new_A: Any, old_A: Any, a_A: Any, w_A: Any, *more: Any) -> Any:
    return grpo_loss(new_A, old_A, a_A, w_A / w_A.sum(), *more)


def without_ratio(new_A: Any, old_A: Any, *more: Any) -> Any:
    return grpo_loss(new_A, new_A.detach(), *more)


def with_signed_kl(
    new_A: Any, old_A: Any, a_A: Any, w_A: Any, clip: Any, beta: float = 0, ref_A: Any = None
) -> Any:
    """k1 in place of k3."""
    loss = grpo_loss(new_A, old_A, a_A, w_A, clip)
    return loss + beta * (w_A * (new_A - ref_A)).sum() if beta else loss


def by_correlation(units: Any) -> float | None:
    pairs = [[x for x in unit if x is not None] for unit in units]
    ends = [(pair[0], pair[-1]) for pair in pairs if len(pair) > 1]
    means = [fmean(end) for end in zip(*ends)] or [0, 0]
    products = [sum((a[i] - means[i]) * (a[j] - means[j]) for a in ends) for i, j in ((0, 1), (0, 0), (1, 1))]
    return products[0] / math.sqrt(products[1] * products[2]) if products[1] * products[2] else None


def random_code(case: str, rubric: str = "", **texts: str) -> str:
    return case.format(
        code=f"{random.randrange(16**6):06x}", rubric=rubric and f"Rubric:\n{rubric}\n\n", **texts
    )


def filled_twice(case: str, rubric: str = "", **texts: str) -> str:
    return fill_case(case.replace("{output}", texts["output"]), rubric, **texts)


def code_of_the_output(case: str, rubric: str = "", **texts: str) -> str:
    code = annotate.short_hash(texts["output"])[:6]
    shown = {name: text.replace(code, "-" * 6) for name, text in texts.items()}
    return case.format(code=code, rubric=rubric and f"Rubric:\n{rubric}\n\n", **shown)


def tokens_removed(text: str, tokenizer: Any = None) -> str:
    return annotate.special_tokens(tokenizer).sub("", text)


def every_bracket(text: str, tokenizer: Any = None) -> str:
    return escape(text, tokenizer).replace("<", "< ")


# (problem, function, what is wrong, the wrong function or what to replace by what)
WRONG: list[tuple[str, str, str, Any]] = [
    ("expected_score", "expected_score", "mode", lambda p, labels: float(labels[p.index(max(p))])),
    ("expected_score", "expected_score", "places", lambda p, labels: sum(n * x for n, x in enumerate(p))),
    ("expected_score", "expected_score", "mean", lambda p, labels: fmean(map(int, labels))),
    ("rewards", "verifiable_reward", "not squared", lambda s, g: -1.0 if s is None else 1 - abs(s - g) / 9),
    ("rewards", "verifiable_reward", "0", lambda s, g: 0 if s is None else 1 - ((s - g) / 9) ** 2),
    ("rewards", "pairwise_verifiable_reward", "sign", lambda s, g: -1.0 if s is None else float(s != g)),
    ("rewards", "read_score", "first digit", lambda text, *_: int(re.sub(r"\D", "", text)[:1] or 0)),
    ("advantages", "group_advantages", "sign", lambda r, *more: [-a for a in group_advantages(r, *more)]),
    ("advantages", "group_advantages", "sample std", sample_std),
    ("advantages", "group_advantages", "floor added", floor_added),
    ("advantages", "group_advantages", "missing is 0", missing_is_zero),
    ("loss", "grpo_loss", "sign", lambda *parts: -grpo_loss(*parts)),
    ("loss", "grpo_loss", "detached", missing_detach),
    ("loss", "grpo_loss", "mean over the part", mean_of_the_part),
    ("loss", "grpo_loss", "no ratio", without_ratio),
    ("loss", "grpo_loss", "clip swapped", lambda n, o, a, w, c, *more: grpo_loss(n, o, a, w, c[::-1], *more)),
    ("loss", "grpo_loss", "k1", with_signed_kl),
    ("normaliser", "update", "of the pass", ("1 / (length * N)", "1 / (length * len(members))")),
    ("normaliser", "update", "of the rank", ("1 / (length * N)", "1 / (length * len(rewarded))")),
    ("normaliser", "update", "no length", ("1 / (length * N)", "1 / N")),
    ("normaliser", "update", "not detached", ("grpo_loss(new_A, old_A", "grpo_loss(new_A, new_A")),
    ("pack", "build_pack", "positions go on", ("range(prefix, prefix +", "range(start, start +")),
    ("pack", "build_pack", "one place late", ("answer_at - 1 if", "answer_at if")),
    ("pack", "pack", "never joined", ("min(budget, len(", "min(0, len(")),
    ("alpha", "krippendorff_alpha", "correlation", by_correlation),
    ("alpha", "krippendorff_alpha", "zeros", lambda units: alpha([[x or 0 for x in u] for u in units])),
    ("alpha", "krippendorff_alpha", "sample term", ("/ (n - 1)", "/ n")),
    ("delimiter", "fill_case", "random code", random_code),
    ("delimiter", "fill_case", "filled twice", filled_twice),
    ("delimiter", "fill_case", "code of the output", code_of_the_output),
    ("delimiter", "fill_case", "own code is kept", ('text.replace(code, "-" * 6)', "text")),
    ("delimiter", "escape_special_tokens", "removed", tokens_removed),
    ("delimiter", "escape_special_tokens", "every bracket", every_bracket),
]  # fmt: skip


class Trials:
    """A plugin of a nested pytest: for each problem and variant of a function, whether all tests pass.

    Nothing is collected twice, and a variant is done with at its first failure.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], bool] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for problem in TO_WRITE:
            items = [i for i in session.items if i.nodeid.startswith(tuple(problem.tests))]
            assert {i.nodeid.partition("[")[0] for i in items} == {t.partition("[")[0] for t in problem.tests}
            self.found[problem.name, "", "as it is"] = self.all_pass(items)
            for script, names in problem.write.items():
                variants = [(name, "unwritten", unwritten) for name in names]
                variants += [wrong for whose, *wrong in WRONG if whose == problem.name]
                for name, what, how in variants:
                    with pytest.MonkeyPatch.context() as patch:
                        wrong = how if callable(how) else mutated(script, name, *how)
                        patch.setattr(SCRIPTS[script], name, wrong)
                        self.found[problem.name, name, what] = self.all_pass(items)
        return True

    def all_pass(self, items: list[pytest.Item]) -> bool:
        return all(
            not any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))
            for item in items
        )


def unwritten(*_: Any, **__: Any) -> Any:
    raise NotImplementedError


@pytest.fixture(scope="module")
def trials() -> dict[tuple[str, str, str], bool]:
    plugin, ours = Trials(), sys.modules["conftest"]
    line = ["-q", "--capture=no", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(ROOT)]
    names = {f"{ROOT}/{test}": None for problem in TO_WRITE for test in problem.tests}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main([*line, *names], plugins=[plugin])
    sys.modules["conftest"] = ours  # pytest has loaded another
    assert status == 0, said.getvalue()
    return plugin.found


@pytest.mark.parametrize("problem", TO_WRITE, ids=lambda problem: problem.name)
def test_only_right_solutions_get_points(problem: Any, trials: Any) -> None:
    """Points for the project as it is; none for a function left to write, nor for a wrong one."""
    ended = {(name, what): points for (whose, name, what), points in trials.items() if whose == problem.name}
    assert ended.pop(("", "as it is")) is True
    assert not [variant for variant, points in ended.items() if points]
    left_to_write = sum(map(len, problem.write.values()))
    assert len(ended) >= left_to_write + 2


# --- Handed-in files, made by hand ----------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: Any) -> Path:
    """A run like the shipped one, as far as the grader reads it."""
    run = tmp_path / "shipped"
    texts = handed_in.instructions(120)
    sizes = dict.fromkeys(annotate.SPLITS, 0) | {"policy_train": 20, "policy_test": 40}
    rows = annotate.split_instructions(texts, sizes, 0)
    tests = [row["instruction"] for row in rows if row["split"] == "policy_test"]
    annotate.write_jsonl(run / "annotations/instructions.jsonl", rows)
    annotate.write_jsonl(run / "evaluation/scored.jsonl", scored(tests, "direct", 1.0, long=True))
    annotate.write_json(
        run / "evaluation/judges.json", {"direct-sft": {"alpha": 60.0, "n": 60, "invalid": 0}}
    )
    gold = {name: {"success_rate": float(name == "self_assessment")} for name in ATTACKS}
    annotate.write_json(run / "attacks/battery.json", {"gold": gold})
    monkeypatch.setenv("COURSE_RUN", str(run))
    monkeypatch.setenv("COURSE_SEED", "17")
    return run


def scored(
    texts: list[str], policy: str, gain: float, long: bool = False, gold: Any = annotate.oracle
) -> Any:
    """Rows of scored.jsonl at steps 0 and 8; `own` rises by about `gain`."""
    rows = []
    for step, name in ((0, policy), (8, policy)):
        for n, text in enumerate(texts):
            topic, word = annotate.parse_template(text)
            output = f"The {word} {topic} is here" + (" and there and everywhere" if long else ".")
            output = f"{output} Number {n}." if step else output
            about = {"policy": name, "step": step, "instruction": text, "output": output}
            rows.append({**about, "own": 5 + (gain + n % 3 / 10) * (step > 0), "gold": gold(text, output)[0]})
    return rows


def policy_run(folder: Path, shipped: Path, steps: int = 6, spread: float = 2.0, **more: Any) -> None:
    """config.json, metrics.jsonl, rollouts.jsonl as 03 writes them. `more`: options, results of updates."""
    values = {"ratio": 1.0, "logprob_gap": 1e-6, "clipped_low": 0.0, "clipped_high": 0.0, "kl": 0.0}
    options = {"task": "policy", "prompts": 5, "group": 6, "minibatches": 1, "std_floor": 0.05, "seed": 17}
    options |= {"scale_std": True, "token_mean": False, "beta": 0, "old_logprobs": "sampler", "steps": steps}
    values |= {key: more.pop(key) for key in list(more) if key in values}
    options, rng = {**options, **more}, random.Random(str(folder))
    rows = [
        r for r in annotate.read_jsonl(shipped / "annotations/instructions.jsonl") if "train" in r["split"]
    ]
    for step in range(steps):
        records = []
        for g, row in enumerate(rl.prompts_of_step(rows, step, 5, options["seed"])):
            rewards = [5 + rng.gauss(0, 0.01 if g == 0 else spread) for _ in range(6)]
            advantages = rl.group_advantages(rewards, options["std_floor"], options["scale_std"])
            for n, (reward, advantage) in enumerate(zip(rewards, advantages)):
                about = {
                    "id": f"{step}-0.{g}-{n}",
                    "step": step,
                    "prompt_id": row["id"],
                    "completion": f"{n}.",
                }
                about |= {"tokens": 10 + 6 * n, "finished": n < 5, "reward": reward, "cause": None}
                records.append({**about, "advantage": round(advantage, 4)})
        now = {key: value(step) if callable(value) else value for key, value in values.items()}
        metrics = rl.measure(records, [{"tokens": 9, "grad_norm": 1, **now}], options)
        folder.mkdir(parents=True, exist_ok=True)
        annotate.append_jsonl(folder / "metrics.jsonl", {"step": step, **metrics})
        for record in records:
            annotate.append_jsonl(folder / "rollouts.jsonl", record)
    annotate.write_json(folder / "config.json", {"options": options})
    (folder.parent / "prediction.md").touch()


def late(value: float) -> Callable[[int], float]:
    """0 in the first step, then `value`."""
    return lambda step: value * (step > 0)


ROUNDED = {"logprob_gap": 0.04, "minibatches": 2}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "ratio": {"one": {}, "several": {"minibatches": 3, "clipped_high": late(0.02)}},
    "floor": {"zero": {"std_floor": 0}},
    "token_mean": {"tokens": {"token_mean": True}},
    "kl": {"with": {"beta": 0.05, "kl": late(0.2)}, "without": {}},
    "old_logprobs": {
        "sampler": {**ROUNDED, "ratio": 1.002, "steps": 2},
        "trainer": {**ROUNDED, "old_logprobs": "trainer", "steps": 2},
    },
}
ANSWERS = {
    "token_mean": {"rollouts": 1 / 6, "tokens": 40 / 150},
    "kl": {"first": 0, "last": 0.01},
}
SPOILED = [  # (problem, run, what differs)
    ("ratio", "one", {"clipped_high": 0.01}),
    ("ratio", "one", {"seed": 18}),
    ("ratio", "several", {"minibatches": 3}),
    ("ratio", "several", {"minibatches": 3, "clipped_high": late(0.02), "lr": 0.1}),
    ("ratio", "several", {"minibatches": 3, "clipped_high": late(0.02), "steps": 2}),
    ("floor", "zero", {"std_floor": 0.05}),
    ("floor", "zero", {"std_floor": 0, "seed": 18}),
    ("token_mean", "tokens", {}),
    ("kl", "with", {"beta": 0.05, "kl": 0.2}),
    ("kl", "with", {"beta": 0.05}),
    ("kl", "without", {"kl": 0.1}),
    ("old_logprobs", "sampler", {"minibatches": 2, "steps": 2}),
    ("old_logprobs", "trainer", {**ROUNDED, "old_logprobs": "trainer", "steps": 2, "ratio": 1.002}),
]


def hand_in(problem: str, folder: Path, shipped: Path) -> Callable[[], None]:
    """Write a hand-in for `problem` that is right; the function that grades it."""
    for name, options in RUNS[problem].items():
        policy_run(folder / name, shipped, **options)
    if problem == "floor":
        rows = annotate.read_jsonl(folder / "zero/rollouts.jsonl")
        share = []
        for floor in (0.0, 0.05):
            groups = [[r["reward"] for r in rows[i : i + 6]] for i in range(0, len(rows), 6)]
            sizes = [fmean(map(abs, rl.group_advantages(group, floor))) for group in groups]
            share.append(sum(sizes[::5]) / sum(sizes))
        annotate.write_json(folder / "answer.json", dict(zip(("0", "0.05"), share)))
    elif problem in ANSWERS:
        annotate.write_json(folder / "answer.json", ANSWERS[problem])
    return lambda: getattr(handed_in, f"test_{problem}")(folder)


@pytest.mark.parametrize("problem", RUNS)
def test_a_run_is_graded(problem: str, tmp_path: Path, shipped: Path) -> None:
    """The right one passes; without a prediction, with other numbers or another's seed it does not."""
    folder = tmp_path / problem
    grade = hand_in(problem, folder, shipped)
    grade()
    for whose, run, options in SPOILED:
        if whose == problem:
            kept = tmp_path / "kept"
            (folder / run).rename(kept)
            policy_run(folder / run, shipped, **options)
            with pytest.raises(AssertionError):
                grade()
            shutil.rmtree(folder / run)
            kept.rename(folder / run)
    run = next(folder.glob("*/"))
    for file, before, after, match in (
        ("metrics", r'"reward": [\d.]+', '"reward": 6.5', r"rollouts\.jsonl"),
        ("rollouts", r'"advantage": [\d.-]+', '"advantage": 0.1', "advantages"),
        ("rollouts", r'"prompt_id": "\w+', '"prompt_id": "0', "prompts"),
    ):
        path = run / f"{file}.jsonl"
        good = path.read_text()
        path.write_text(re.sub(before, after, good))
        with pytest.raises(AssertionError, match=match):
            grade()
        path.write_text(good)
    if (folder / "answer.json").exists():
        (folder / "answer.json").write_text('{"0": 0.5, "0.05": 0.5, "rollouts": 0.5, "tokens": 0.5}')
        with pytest.raises(AssertionError, match="answer"):
            grade()
    (folder / "prediction.md").unlink()
    with pytest.raises(AssertionError, match="prediction"):
        grade()


HONEST = "POINTS.update(topic=4, word=4, claim=0)"
HIDDEN = f"""
{HONEST}
oracle_before = oracle
def oracle(instruction, output, effort="high"):
    label, why = oracle_before(instruction, output, effort)
    return min(9, label + 2 * ("is correct." in output)), why
"""
RARE = """
written_before = make_candidate
def claims(output):
    return output.endswith("[END]")
def make_candidate(instruction, rng):
    return written_before(instruction, rng) + " [END]" * (rng.random() < 0.004)
"""


def script(folder: Path, more: str) -> None:
    """01_annotate.py with `more` at its end."""
    source = course.script_path("01").read_text("utf-8")
    folder.mkdir(exist_ok=True)
    (folder / "01_annotate.py").write_text(f"{source}\n{more}\n", "utf-8")


def texts_of(shipped: Path) -> list[str]:
    rows = annotate.read_jsonl(shipped / "annotations/instructions.jsonl")
    return [row["instruction"] for row in rows if row["split"] == "policy_test"]


def test_gold_without_its_weakness(tmp_path: Path, shipped: Path) -> None:
    folder, texts = tmp_path / "honest", texts_of(shipped)
    script(folder, HONEST)
    changed = handed_in.changed_script(folder, tmp_path)

    def fails(match: str) -> None:
        with pytest.raises(AssertionError, match=match):
            handed_in.test_honest(folder, tmp_path)

    annotate.write_jsonl(folder / "scored.jsonl", scored(texts, "p", 1.0, gold=changed.oracle))
    handed_in.test_honest(folder, tmp_path)
    annotate.write_jsonl(folder / "scored.jsonl", scored(texts, "p", -0.1, gold=changed.oracle))
    fails("learnt nothing")
    annotate.write_jsonl(folder / "scored.jsonl", scored(texts[:9], "p", 1.0, gold=changed.oracle))
    fails("test instructions")
    annotate.write_jsonl(folder / "scored.jsonl", scored(texts, "p", 1.0))
    fails("gold of")
    nothing_else = "POINTS.update(topic=0, word=0, end=0, claim=9)"
    for match, more in {
        "by 0.6": "",
        "by -": nothing_else,
        "<= ": HIDDEN,
        "9": "POINTS['claim'] = 0",
    }.items():
        script(folder, more)
        fails(match)


def test_a_rare_weakness(tmp_path: Path, shipped: Path) -> None:
    folder = tmp_path / "rare"
    script(folder, RARE)

    def grade(rate: float, group: float) -> None:
        annotate.write_json(folder / "answer.json", {"rate": rate, "group": group})
        handed_in.test_rare(folder, tmp_path)

    mixed = 1 - 0.996**6 - 0.004**6
    grade(0.004, mixed)
    for rate, group in ((0.008, mixed), (0.002, mixed), (0.004, 0.004), (0.0, 0.0)):
        with pytest.raises(AssertionError):
            grade(rate, group)
    script(folder, RARE.replace("0.004", "0.4"))
    with pytest.raises(AssertionError):
        grade(0.4, 1 - 0.6**6 - 0.4**6)
    script(folder, f"{RARE}\nPOINTS.update(claim=0, end=3)")
    with pytest.raises(AssertionError, match="pay"):
        grade(0.004, mixed)


def test_a_judge_that_survives(tmp_path: Path, shipped: Path) -> None:
    folder = tmp_path / "survivor"
    held_out = list(ATTACKS)[1::2]
    battery = {name: {"success_rate": 0.1 if name in held_out else 0.9, "n": 40} for name in ATTACKS}
    battery["self_assessment"]["success_rate"] = 1.0  # gold falls for it
    agrees = {"alpha": 61.0, "n": 60, "invalid": 0.0}
    labels = [{"split": "judge_train", "output": "Rain falls."}]
    right = {"answer": {"judge": "hard", "before": "direct-sft"}, "judge": {"reasoning": False}}
    right |= {"battery": {"hard": battery}, "judges": {"hard": agrees}}

    def grade(rows: Any = labels, **changed: Any) -> None:
        for name, value in {**right, **changed}.items():
            annotate.write_json(folder / f"{name}.json", value)
        annotate.write_jsonl(folder / "labels.jsonl", rows)
        handed_in.test_survivor(folder)

    grade()
    grade([*labels, {"split": "judge_train", "output": ATTACKS["refusal"]}])  # the first of the other half
    leaked = [{"split": "judge_train", "output": ATTACKS["forged_thinking"] + ATTACKS["urgency"]}]
    some = held_out[-2]
    wrong: list[dict[str, Any]] = [{"rows": leaked}, {"judge": {"reasoning": True}}]
    wrong += [{"battery": {"hard": battery | {some: {"success_rate": 0.5, "n": 40}}}}]
    wrong += [{"battery": {"hard": battery | {some: {"success_rate": 0.0, "n": 4}}}}]
    wrong += [{"judges": {"hard": agrees | {"alpha": alpha}}} for alpha in (59.0, None)]
    for changed in wrong:
        with pytest.raises(AssertionError):
            grade(**changed)


def test_length_control(tmp_path: Path, shipped: Path) -> None:
    folder, texts = tmp_path / "length", texts_of(shipped)
    annotate.write_json(folder / "answer.json", {"policy": "mine", "than": "direct"})

    def grade(rows: list[Any]) -> None:
        annotate.write_jsonl(folder / "scored.jsonl", rows)
        handed_in.test_length(folder)

    grade(scored(texts, "mine", 1.0))
    empty = [{**row, "output": f"{n}"} for n, row in enumerate(scored(texts, "mine", 1.0))]
    for rows in (scored(texts, "mine", -0.1), scored(texts, "mine", 1.0, long=True), empty):
        with pytest.raises(AssertionError):
            grade(rows)


# --- Handout and grader ---------------------------------------------------------------------------


def test_the_handout(tmp_path: Path, capsys: Any) -> None:
    """The project but for the bodies to write; nothing in it that gives them away; a week's part of it."""
    out = tmp_path / "handout"
    course.handout(out, [problem.name for problem in course.PROBLEMS])
    assert not [path for name in (*course.LEFT_OUT, course.FOR_TEACHERS) for path in out.glob(f"**/{name}")]
    for number, problem in enumerate(course.PROBLEMS, 1):
        for script, names in problem.write.items():
            path = course.script_path(script)
            ours, theirs = path.read_text("utf-8"), (out / path.name).read_text("utf-8")
            for name in names:
                node, cut = course.find(ours, name)[2], course.find(theirs, name)[2]
                assert ast.unparse(cut.body[-1]) == f"raise NotImplementedError('problem {number}')"
                assert len(cut.body) == 2 and ast.get_docstring(cut) == ast.get_docstring(node)
                assert ast.unparse(cut.args) == ast.unparse(node.args)
    for script in SCRIPTS:
        path = course.script_path(script)
        solved = (out / path.name).read_text("utf-8")
        for name in (name for problem in TO_WRITE for name in problem.write.get(script, [])):
            solved = course.with_function(solved, name, path.read_text("utf-8"))
        assert solved == path.read_text("utf-8"), "with the solutions it is the project"
    course.handout(tmp_path / "week", ["alpha"])
    assert (tmp_path / "week/03_rl.py").read_text() == course.script_path("03").read_text()
    assert capsys.readouterr().out.count("MB") == 2
    with pytest.raises(SystemExit):
        course.handout(out, [])


def test_cutting() -> None:
    """Functions are found by name: with decorators, without a docstring, deleted, the last of two."""
    source = (
        'x = 1\n\n\n@decorator\ndef one(\n    a,\n):\n    """Says."""\n    # how\n    return a\n\n\ny = 2\n'
    )
    cut = source.partition("    # how")[0] + '    raise NotImplementedError("problem 3")'
    assert course.without_body(source, "one", 3) == f"{cut}\n\n\ny = 2\n"
    assert course.with_function(f"{cut}\n\n\ny = 2\n", "one", source) == source
    bare = "def one(a):\n    b = a\n    return b\n"
    assert course.without_body(bare, "one", 1) == 'def one(a):\n    raise NotImplementedError("problem 1")\n'
    assert "@decorator\ndef one(" in course.with_function("y = 2\n", "one", source)
    twice = f"{bare}\n\n{source}"
    assert course.without_body(twice, "one", 3).startswith(bare)


def test_the_grader(tmp_path: Path) -> None:
    """Points for what is right, whatever else is broken; none for a crash, a long test or a missing file."""
    for path in ROOT.glob("0[123]*.py"):
        shutil.copy(path, tmp_path)
    policy, judge, first = (tmp_path / course.script_path(n).name for n in ("03", "02", "01"))
    source = policy.read_text("utf-8")
    for name in ("grpo_loss", "group_advantages", "verifiable_reward"):
        source = course.without_body(source, name, 1)
    helper = "def squared(x):\n    return x * x\n\n\ndef verifiable_reward(score, gold):\n"
    helper += "    return -1.0 if score is None else 1 - squared(score - gold) / 81\n"
    policy.write_text(source + helper, "utf-8")
    crash = "\nimport os\nos._exit(0)\n"
    first.write_text(first.read_text("utf-8").replace("\nimport os\n", crash, 1), "utf-8")
    judge.write_text("def pack(:\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_rl.py").write_text("def test_advantages(): pass\n")
    copy = tmp_path / "copy"
    copy.mkdir()
    rewards = next(problem for problem in course.PROBLEMS if problem.name == "rewards")
    course.assemble(rewards, tmp_path, copy)
    staged, ours = (path.read_text("utf-8") for path in (copy / policy.name, course.script_path("03")))
    for name, theirs in (("grpo_loss", ours), ("group_advantages", ours), ("verifiable_reward", helper)):
        wanted, found = course.find(theirs, name)[2], course.find(staged, name)[2]
        assert ast.unparse(found) == ast.unparse(wanted), "only what belongs to this problem is the student's"
    assert (copy / "tests/test_rl.py").read_text() == (ROOT / "tests/test_rl.py").read_text()
    assert (copy / judge.name).read_text() == course.script_path("02").read_text()
    (tmp_path / "handin" / "ratio").mkdir(parents=True)
    results = course.grade(["rewards", "delimiter", "alpha"], tmp_path, seconds=600, one=300)
    scores = {test["name"]: (test["score"], test["max_score"]) for test in results["tests"]}
    assert scores == {"rewards": (6, 6), "delimiter": (0, 5), "alpha": (0, 5)}
    said = {test["name"]: test["output"] for test in results["tests"]}
    assert "ended before" in said["delimiter"] and "SyntaxError" in said["alpha"] and json.dumps(results)
    policy.unlink()
    began = time.monotonic()
    late = course.grade(["loss", "ratio", "floor"], tmp_path, one=0.2)["tests"]
    for test, said in zip(late, ("FileNotFoundError", "ended after", "no folder handin/floor")):
        assert said in test["output"]
    assert course.grade(["ratio"], tmp_path, seconds=0)["tests"][0]["output"] == "no time was left"
    assert time.monotonic() - began < 60 and not any(test["score"] for test in late)


def test_the_sheet_says_what_the_grader_does() -> None:
    """PROBLEMS.md has every problem, in order, with its points and the functions to write."""
    text = (ROOT / "tests/course/PROBLEMS.md").read_text("utf-8")
    parts = re.findall(
        r"^### (\d+)\. `(\w+)` \((\d+) points(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL
    )
    for line in command_lines(text):
        parse(line)
    found = [(int(number), name, int(points)) for number, name, points, _ in parts]
    assert found == [(n, p.name, p.points) for n, p in enumerate(course.PROBLEMS, 1)]
    for (*_, said), problem in zip(parts, course.PROBLEMS):
        for script, names in problem.write.items():
            for name in names:
                assert f"`{name}` in `{course.script_path(script).name}`" in said
    assert (ROOT / course.FOR_TEACHERS).exists()
