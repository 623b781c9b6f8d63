"""Several runs side by side: means, spreads, what is missing; and the measures that no training saw."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

annotate = import_module("01_annotate")
evaluate = import_module("04_evaluate")


def write_run(study: Path, name: str, alpha: float | None, gold: tuple[float, float]) -> None:
    folder = study / name / "evaluation"
    (study / name / "annotations").mkdir(parents=True)
    annotate.write_json(folder / "judges.json", {"direct-sft": {"alpha": alpha, "invalid": 0.0, "thinking_tokens": 0.0, "n": 60}})
    points = [{"step": 6 * i, "own": 5.0 + i, "gold": g, "fluency": -1.0 - i, "overlap": 0.1} for i, g in enumerate(gold)]
    annotate.write_json(folder / "gold.json", {"curves": {"direct": points}})


def study(folder: Path) -> tuple[int, str]:
    result = CliRunner().invoke(evaluate.app, ["study", "--study", str(folder)])
    return result.exit_code, result.output


def test_runs_side_by_side(tmp_path: Path) -> None:
    write_run(tmp_path, "seed-0", 40.0, (7.0, 6.0))
    write_run(tmp_path, "seed-1", 60.0, (8.0, 8.5))
    (tmp_path / "seed-2" / "annotations").mkdir(parents=True)
    status, text = study(tmp_path)
    assert status == 0, text
    judge, policy = (next(line.split() for line in text.splitlines() if line.startswith(name)) for name in ("direct-sft ", "direct "))
    assert "seed-2 is not evaluated yet" in text
    assert judge[1:6] == ["alpha", "50.0", "40.0", "/", "60.0"]
    assert policy[:3] == ["direct", "2", "6"]
    assert " ".join(policy[3:]) == "5.00 1.00 (1.00 to 1.00) 7.50 -0.25 (-1.00 to 0.50) -1.00 -1.00 (-1.00 to -1.00) 0.10 0.00 (0.00 to 0.00)"
    assert set(json.loads((tmp_path / "study.json").read_text())["curves"]["direct"]) == {"seed-0", "seed-1"}
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_score_that_no_run_has(tmp_path: Path) -> None:
    """One where every judgement was unusable, or that an older version did not write."""
    write_run(tmp_path, "seed-0", 40.0, (7.0, 6.0))
    path = tmp_path / "seed-0/evaluation/gold.json"
    points = json.loads(path.read_text())["curves"]["direct"]
    annotate.write_json(path, {"curves": {"direct": [{**p, "own": None, "fluency": None} for p in points]}})
    write_run(tmp_path, "seed-1", None, (8.0, 8.5))
    status, text = study(tmp_path)
    assert status == 0 and "none" in text, text
    judge = next(line.split() for line in text.splitlines() if line.startswith("direct-sft "))
    assert judge[1:6] == ["alpha", "40.0", "40.0", "/", "none"]


def test_nothing_to_show(tmp_path: Path) -> None:
    status, text = study(tmp_path)
    assert status != 0 and "no evaluated run" in text
    write_run(tmp_path, "seed-0", 40.0, (7.0, 6.0))
    shutil.rmtree(tmp_path / "seed-0/evaluation")
    assert study(tmp_path)[0] != 0


def test_overlap_by_hand() -> None:
    assert evaluate.overlap(["The cat sat.", "the dog sat"]) == pytest.approx(2 / 4)
    assert evaluate.overlap(["a b", "a b", "c d"]) == pytest.approx((1 + 0 + 0) / 3)
    assert evaluate.overlap(["", "."]) == 0.0
    assert evaluate.overlap(["alone"]) is None


def test_an_output_over_the_context_has_no_fluency(tokenizer: Any) -> None:
    class Full:
        def logprobs(self, *_: list[int]) -> list[float]:
            raise annotate.TooLong("maximum context length")

    row = {"instruction": "Say yes.", "output": "<|" * 50, "finished": False}
    assert evaluate.measure_fluency(Full(), tokenizer, row) == {"fluency": None, "cause": "over the context"}
