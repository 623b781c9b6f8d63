"""Arena-Hard: scores against hand-computed cases and an independent fit; style counts; games; bad input."""

import json
import math
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED
from typer.testing import CliRunner

evaluate = import_module("04_evaluate")
CREATIVE, FLASH, O3 = "creative_writing", "gemini-2.0-flash-001", "o3-mini-2025-01-31"
LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A", "B<<A", "B<A", "B=A", "A<B", "A<<B")


def run(line: str) -> Any:
    return CliRunner().invoke(evaluate.app, line.split())


def lines(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(r) for r in records))  # no newline at the end: others' files may lack it


def answer(uid: str, model: str, tokens: int = 100, headers: int = 0, items: int = 0, bold: int = 0) -> dict[str, Any]:
    marks = {"header_count": {"h1": headers, "h2": 0}, "list_count": {"ordered": items}, "bold_count": {"**": bold, "__": 0}}
    return {"uid": uid, "model": model, "messages": [], "metadata": {"token_len": tokens, **marks}}


def judgment(uid: str, model: str, first: Any, second: Any, category: str = CREATIVE) -> dict[str, Any]:
    games = [{"score": first, "judgment": {}}, None if second == "no game" else {"score": second, "judgment": {}}]
    return {"uid": uid, "category": category, "judge": "gpt-4.1", "model": model, "baseline": FLASH, "games": games}


def folder(path: Path, rows: list[dict[str, Any]], answers: list[dict[str, Any]]) -> Path:
    for name in {row["model"] for row in rows}:
        lines(path / "model_judgment/gpt-4.1" / f"{name.replace('/', '_')}.jsonl", [r for r in rows if r["model"] == name])
    for name in {row["model"] for row in answers}:
        lines(path / "model_answer" / f"{name.replace('/', '_')}.jsonl", [r for r in answers if r["model"] == name])
    return path


def scored(path: Path, category: str = CREATIVE) -> dict[str, Any]:
    result = run(f"arena-score --data {path} --category {category} --json {path}/out.json")
    assert result.exit_code == 0, result.output
    return json.loads((path / "out.json").read_text())


# --- scores --------------------------------------------------------------------------------------


def test_score_by_hand(tmp_path: Path) -> None:
    rows = [
        judgment("1", "ours", "B>>A", "A>B"),  # baseline in A loses three times, the candidate wins once: 4 of 4
        judgment("2", "ours", "A>B", "A=B"),  # 0 of 1 and a tie: 0.5 of 2
        judgment("3", "ours", "B<A", "B>>A"),  # A>B mirrored: 0 of 1; then 0 of 3
        judgment("4", "ours", "A<<B", "B<<A"),  # both mirrored: 3 of 3 and 3 of 3
        judgment("5", "ours", "A=B", None),  # the whole row is dropped
        judgment("6", "ours", "B>A", "no game"),
        judgment("7", "ours", "[[A>B]]", "A>B"),  # no label
        judgment("8", "ours", "A>>B", "B>>A", category="hard_prompt"),
        judgment("1", "org/other", "A=B", "B=A"),
        judgment("1", "org/other", "A=B", "B=A"),  # the same question twice counts twice
    ]
    found = scored(folder(tmp_path, rows, [answer(r["uid"], m) for r in rows for m in (r["model"], FLASH)]))
    assert set(found) == {"ours", "other", FLASH}
    assert found["ours"]["battles"] == 4 + 2 + 4 + 6 and found["ours"]["score"] == 100 * 10.5 / 16
    assert found["other"]["battles"] == 4 and found["other"]["score"] == 50 and found["other"]["ci"] == [50, 50]
    assert found[FLASH]["score"] == found[FLASH]["score_style"] == 50
    # No style differs, so style control changes nothing.
    assert found["ours"]["score_style"] == pytest.approx(found["ours"]["score"]) and found["other"]["score_style"] == pytest.approx(50)


def synthetic(path: Path, models: int, questions: int, seed: int) -> Path:
    """Random answers, and verdicts that depend on skill and length."""
    rng = random.Random(seed)
    names = [FLASH, *(f"model-{i}" for i in range(models))]
    answers = {
        (name, uid): answer(uid, name, int(rng.lognormvariate(6 + i / 5, 0.6)), rng.randint(0, 9), rng.randint(0, 20), rng.randint(0, 9 + i))
        for i, name in enumerate(names) for uid in map(str, range(questions))
    }  # fmt: skip
    rows = []
    for i, name in enumerate(names[1:]):
        for uid in map(str, range(questions)):
            longer = math.log(answers[name, uid]["metadata"]["token_len"] / answers[FLASH, uid]["metadata"]["token_len"])
            lean = [sign * (i / 2 - 1 + longer) + rng.gauss(0.2, 1) for sign in (-1, 1)]
            rows.append(judgment(uid, name, *(LABELS[min(4, max(0, round(2 - 1.5 * z)))] for z in lean)))
    return folder(path, rows, list(answers.values()))


def test_style_control_is_the_maximum_likelihood_of_all_battles(tmp_path: Path) -> None:
    """Against torch's own minimiser on battles written out one by one, with a coefficient for the baseline too."""
    import torch

    data = synthetic(tmp_path, models=3, questions=60, seed=1)
    found = scored(data)
    rows, metadata = evaluate.read_judgments(data, None, CREATIVE), evaluate.read_metadata(data)
    names = sorted(metadata)
    features, styles, wins = [], [], []
    for row in rows:
        a, b = ([v if isinstance(v, int) else sum(v.values()) for v in metadata[m][row["uid"]].values()] for m in (row["model"], FLASH))
        style = [(a[0] - b[0]) / (a[0] + b[0])]
        for x, y in zip(a[1:], b[1:]):
            x, y = x / (a[0] + 1), y / (b[0] + 1)
            style.append((x - y) / (x + y + 1))
        for position, game in enumerate(row["games"]):
            for_A = {"A": 1.0, "B": 0.0, "=": 0.5}["=" if "=" in game["score"] else game["score"][0]]
            for _ in range(3 if len(game["score"]) == 4 else 1):
                features.append([(n == row["model"]) - (n == FLASH) for n in names])
                styles.append(style)
                wins.append(for_A if position == 1 else 1 - for_A)
    z = torch.tensor(styles, dtype=torch.float64)
    inputs = torch.cat([torch.tensor(features, dtype=torch.float64), (z - z.mean(0)) / z.std(0)], 1)
    beta = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
    minimiser = torch.optim.LBFGS([beta], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        minimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ beta, torch.tensor(wins, dtype=torch.float64), reduction="sum")
        loss.backward()
        return loss

    minimiser.step(closure)
    beta_K = beta.detach()
    for name in names:
        difference = float(beta_K[names.index(name)] - beta_K[names.index(FLASH)])
        assert found[name]["score_style"] == pytest.approx(100 / (1 + math.exp(-difference)), abs=1e-3)
        if name != FLASH:
            assert found[name]["battles"] == sum(row[names.index(name)] for row in features)
    assert max(abs(found[n]["score_style"] - found[n]["score"]) for n in names) > 1  # style does matter here


def test_intervals_hold_the_score_and_repeat(tmp_path: Path) -> None:
    found = scored(synthetic(tmp_path, models=2, questions=80, seed=2))
    assert found == scored(tmp_path)
    for name in ("model-0", "model-1"):
        score, n = found[name]["score"] / 100, found[name]["battles"]
        (low, high), (low_style, high_style) = found[name]["ci"], found[name]["ci_style"]
        assert low < 100 * score < high and low_style < found[name]["score_style"] < high_style
        # Battles are 0, 0.5 or 1, so their spread is at most that of a coin; 90 % of a normal is 3.29 wide.
        assert 0.7 < (high - low) / 100 / (3.29 * math.sqrt(score * (1 - score) / n)) < 1.1


def test_a_model_that_wins_everything_has_a_score(tmp_path: Path) -> None:
    rows = [judgment(str(i), "best", "B>A", "A>>B") for i in range(5)] + [judgment(str(i), "even", "A=B", "A=B") for i in range(5)]
    found = scored(folder(tmp_path, rows, [answer(str(i), m) for i in range(5) for m in ("best", "even", FLASH)]))
    assert found["best"]["score"] == 100 and found["best"]["score_style"] > 99.99 and found["even"]["score_style"] == pytest.approx(50)


# --- style ---------------------------------------------------------------------------------------


def test_style_by_hand() -> None:
    text = "# One\n## Two\n#No\n1. a\n - b\n* c\n+d\n**bold** and __too__ ** not\n**\n```\n# code\n- code\n```\n####### no\n"
    found = evaluate.style_metadata(text)
    assert found["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert found["list_count"] == {"ordered": 1, "unordered": 2} and found["bold_count"] == {"**": 1, "__": 1}


@pytest.mark.skipif(not (SHARED / "arena_hard").exists(), reason="needs the shared answers")
def test_style_of_the_shipped_answers() -> None:
    rows = [json.loads(line) for line in (SHARED / "arena_hard" / f"{O3}.answers.jsonl").open()]
    for row in rows:
        shipped = {key: value for key, value in row["metadata"].items() if key != "token_len"}
        assert evaluate.style_metadata(row["messages"][-1]["content"]["answer"]) == shipped, row["uid"]
    assert len(rows) == 750


# --- bad input -----------------------------------------------------------------------------------

GOOD = [judgment("1", "ours", "A>B", "A>B"), judgment("2", "ours", "A>B", "A=B")]
ANSWERS = [answer(uid, model) for uid in ("1", "2") for model in ("ours", FLASH)]


@pytest.mark.parametrize(
    ("rows", "answers", "options", "says"),
    [
        (GOOD, ANSWERS, "--category poetry", "must be one of hard_prompt, creative_writing"),
        (GOOD, ANSWERS, "--category hard_prompt", "no judgment of category hard_prompt; it has creative_writing"),
        (GOOD, ANSWERS, "--category creative_writing --judge other", "no judge other; it has: gpt-4.1"),
        ([], ANSWERS, "--category creative_writing", "no judge gpt-4.1; it has: none"),
        (GOOD, ANSWERS[:1] + ANSWERS[1:2], "--category creative_writing", "uid 2 of ours is unknown"),
        (GOOD, [a for a in ANSWERS if a["model"] != "ours"], "--category creative_writing", "model ours has judgments"),
        (GOOD, [a for a in ANSWERS if a["model"] == "ours"], "--category creative_writing", f"model {FLASH}"),
        ([judgment("9", "ours", "A>B", "A>B")], ANSWERS, "--category creative_writing", "uid 9 of ours is unknown"),
        ([judgment("1", "ours", None, "A>B")], ANSWERS, "--category creative_writing", "nothing to score"),
        ([{"uid": "1", "model": "ours"}], ANSWERS, "--category creative_writing", "line 1: not a record with the fields uid, category"),
        (GOOD, [*ANSWERS, {"uid": "3", "model": "ours", "metadata": {"token_len": 1}}], "--category creative_writing", "uid 3 has no metadata"),
    ],
)  # fmt: skip
def test_bad_folder(tmp_path: Path, rows: list[Any], answers: list[Any], options: str, says: str) -> None:
    result = run(f"arena-score --data {folder(tmp_path, rows, answers)} --json {tmp_path}/out.json {options}")
    assert result.exit_code == 1 and says in result.output, result.output
    assert result.output.count("\n") <= 2 and not (tmp_path / "out.json").exists()
