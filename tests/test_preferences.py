"""Preference data for the judges and the policies; long files in little memory; efforts, rubrics, plans."""

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SHARED, command

annotate = import_module("01_annotate")
sft = import_module("02_train_judge")

OFF, PERSONA, ON = "allenai/tulu-3-sft-reused-off-policy-8b", "allenai/tulu-3-persona-if", "allenai/tulu-3-sft-reused-on-policy-8b"


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def row(prompt: Any, chosen: Any, rejected: Any, source: str = OFF) -> dict[str, Any]:
    """One row with the columns of the mixture; an answer given as text becomes a chat that repeats the prompt."""
    chats = [answer if isinstance(answer, list) else [user(prompt), assistant(answer)] for answer in (chosen, rejected)]
    return {"id": "x", "prompt": prompt, "chosen": chats[0], "rejected": chats[1], "source": source}


def read(tmp_path: Path, table: list[dict[str, Any]], **more: Any) -> tuple[Any, Any]:
    annotate.write_jsonl(tmp_path / "rows.jsonl", table)
    return annotate.read_preferences(str(tmp_path / "rows.jsonl"), **{"rows": 100, "seed": 0, "max_chars": 50, **more})


BLEMISHES = [
    # (row, candidates kept or None where the row is dropped, what is counted)
    (row("plain", "a", "b"), ["a", "b"], "row used for judges"),
    (row("persona", "a", "b", PERSONA), ["a", "b"], "row used for judges"),
    (row("without turn", [assistant("a")], [assistant("b")]), ["a", "b"], "row used for judges"),
    (row("twice", [user("twice"), user("twice\n"), assistant("a")], "b"), ["a", "b"], "candidate kept: user's turn twice"),
    (row("same", "a", "a"), ["a"], "candidate dropped: the same as the other"),
    (row("one empty", " \n", "b"), ["b"], "candidate dropped: empty"),
    (row("one is None", None, "b"), ["b"], "candidate dropped: not text"),
    (row("parts", [user("parts"), assistant([{"type": "text", "text": "a"}])], "b"), ["b"], "candidate dropped: not text"),
    (row("no chat", [], "b"), ["b"], "candidate dropped: not a chat"),
    (row("no answer", [user("no answer")], "b"), ["b"], "candidate dropped: empty"),
    (row("one too long", "a", "b" * 51), ["a"], "candidate dropped: too long"),
    (row("both too long", "a" * 51, "b" * 51), None, "row dropped: no candidate left"),
    (row("turns", [user("turns"), assistant("x"), user("more"), assistant("a")], "b"), None, "row dropped: multi-turn"),
    (row("system", [{"role": "system", "content": "x"}, user("system"), assistant("a")], "b"), None, "row dropped: multi-turn"),
    (row("other turn", [user("something else"), assistant("a")], "b"), None, "row dropped: user's turn is not the prompt"),
    (row("p" * 51, "a", "b"), None, "row dropped: prompt too long"),
    (row("  \n", "a", "b"), None, "row dropped: prompt empty"),
    (row(None, "a", "b"), None, "row dropped: prompt not text"),
    (row([user("list")], "a", "b"), None, "row dropped: prompt not text"),
]


@pytest.mark.parametrize(("line", "kept", "counted"), BLEMISHES, ids=[f"{number} {b[2]}" for number, b in enumerate(BLEMISHES)])
def test_each_blemish_is_handled_and_counted(line: Any, kept: Any, counted: str, tmp_path: Path, capsys: Any) -> None:
    candidates, others = read(tmp_path, [line, row("beside it", "x", "y")])
    assert candidates.pop("beside it") == ["x", "y"]
    assert candidates == ({} if kept is None else {line["prompt"]: kept}) and others == []
    assert f"{1 + (counted == 'row used for judges'):10}  {counted}\n" in capsys.readouterr().out


def test_all_blemishes_together_are_counted_once_each(tmp_path: Path, capsys: Any) -> None:
    rows = [line for line, _, _ in BLEMISHES]
    candidates, _ = read(tmp_path, rows)
    assert candidates == {line["prompt"]: kept for line, kept, _ in BLEMISHES if kept}
    lines = capsys.readouterr().out.splitlines()
    counts = {name: int(count) for count, name in (line.split(maxsplit=1) for line in lines if line.startswith("  "))}
    assert counts[OFF] == 18 and counts[PERSONA] == 1
    assert sum(n for name, n in counts.items() if name.startswith("row ")) == len(rows), "each row has one fate"
    assert sum(n for name, n in counts.items() if name.startswith("candidate dropped")) == 2 * 12 - sum(map(len, candidates.values()))


def test_source_tells_judges_from_policies_and_a_prompt_counts_once(tmp_path: Path, capsys: Any) -> None:
    rows = [row(f"off {i}", "a", "b") for i in range(20)] + [row(f"on {i}", "a", None, ON) for i in range(20)]
    rows += [row(f"off {i % 20} ", "c", "d", (ON, OFF, PERSONA)[i % 3]) for i in range(40)]
    candidates, others = read(tmp_path, rows, rows=8, seed=1)
    assert len(candidates) == 8 and len(others) == 32 and all(text.startswith("off") for text in candidates)
    assert len({text.strip() for text in [*candidates, *others]}) == 40
    assert "40  row dropped: prompt seen before" in capsys.readouterr().out
    assert (candidates, others) == read(tmp_path, rows, rows=8, seed=1)
    assert candidates != read(tmp_path, rows, rows=8, seed=2)[0], "the seed draws the rows"


def test_sources_that_say_nothing_of_policies(tmp_path: Path) -> None:
    rows = [row(f"q {i}", "a", "b", ("helpful", "harmless")[i % 2]) for i in range(12)]
    candidates, others = read(tmp_path, rows, rows=8)
    assert len(candidates) == 8 and len(others) == 4


def test_the_same_table_through_the_datasets_library(tmp_path: Path, monkeypatch: Any) -> None:
    """The path of a hub data set, with the library's JSON loader in the hub's place."""
    import datasets

    rows = [row(f"q {i}", f"a {i}", f"b {i}", (OFF, ON)[i % 2]) for i in range(30)]
    expected = read(tmp_path, rows, rows=10)
    table = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    assert set(table.column_names) == {"id", *annotate.COLUMNS}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    assert annotate.read_preferences("some/mixture", rows=10, seed=0, max_chars=50) == expected
    table = table.remove_columns("source")
    with pytest.raises(SystemExit):
        annotate.read_preferences("some/mixture", rows=10, seed=0, max_chars=50)


def test_a_name_that_is_neither_file_nor_data_set(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        annotate.read_preferences(str(tmp_path / "nowhere.jsonl"), rows=1, seed=0, max_chars=50)
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_somebody_elses_file_is_not_mended(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = json.dumps(row("one", "a", "b")) + "\n" + json.dumps(row("two", "a", "b"))
    for tail in ("", "\n" + json.dumps(row("three", "a", "b"))[:-9]):
        path.write_text(text + tail)
        assert set(annotate.read_preferences(str(path), rows=9, seed=0, max_chars=50)[0]) == {"one", "two"}
        assert path.read_text() == text + tail


def options(**more: Any) -> dict[str, Any]:
    return {"preset": "laptop", **annotate.preset_values(annotate.PRESETS, "laptop"), **more}


def test_held_out_sets_have_two_outputs_an_instruction(tmp_path: Path, capsys: Any) -> None:
    rows = [row(f"q {i}", "a", "b" if i % 3 else "a") for i in range(60)] + [row(f"p {i}", "a", "b", ON) for i in range(9)]
    annotate.write_jsonl(tmp_path / "rows.jsonl", rows)
    sizes = {"judge_train": 40, "judge_validation": 5, "judge_test": 11, "policy_train": 100, "policy_test": 4}
    annotate.write_outputs(options(data=str(tmp_path / "rows.jsonl"), **sizes), tmp_path, tmp_path)
    instructions, outputs = annotate.read_jsonl(tmp_path / "instructions.jsonl"), annotate.read_jsonl(tmp_path / "outputs.jsonl")
    # 56 off-policy rows are for the judges; the other 4 and 9 on-policy ones make 13 for the policies, 4 of them held out.
    assert Counter(r["split"] for r in instructions) == {**sizes, "policy_train": 9}
    assert "policy_train: 9 instructions, 100 were asked for" in capsys.readouterr().out
    assert len({r["instruction"] for r in instructions}) == len({r["id"] for r in instructions}) == len(instructions)
    counts = Counter(r["split"] for r in outputs)
    assert counts["judge_test"] == 22 and counts["judge_validation"] == 10 and 40 < counts["judge_train"] < 80
    assert len({r["id"] for r in outputs}) == len(outputs)
    with pytest.raises(SystemExit):
        annotate.write_outputs(options(data=str(tmp_path / "rows.jsonl"), **{**sizes, "judge_test": 60}), tmp_path, tmp_path)


def test_llmbar_texts_as_preferences(tmp_path: Path, capsys: Any) -> None:
    """Real instructions and answers in the columns of the mixture: none is lost without being counted."""
    if not (SHARED / "llmbar").exists():
        pytest.skip("shared data not here")
    pairs = [r for path in sorted((SHARED / "llmbar").glob("*.json")) for r in json.loads(path.read_text())]
    rows = [row(r["input"], r["output_1"], r["output_2"]) for r in pairs]
    candidates, others = read(tmp_path, rows, rows=10**6, max_chars=8000)
    fates = capsys.readouterr().out
    assert others == [] and len(candidates) == len({" ".join(r["input"].split()) for r in pairs}) > 300
    assert f"{len(pairs):8,}  {OFF}" in fates and f"{len(pairs) - len(candidates):8,}  row dropped: prompt seen before" in fates
    texts = {text for r in pairs for text in (r["output_1"], r["output_2"])}
    assert all(answer in texts for answers in candidates.values() for answer in answers)


# --- long files, little memory -------------------------------------------------------------------


def test_labelling_holds_no_texts(tmp_path: Path) -> None:
    """20 MB of outputs are labelled within 4 MB, in a first and in a resumed run; the judgements are all there."""

    def rows() -> Any:
        for i in range(2000):
            yield {"id": f"{i}", "split": "judge_train", "instruction": f"{i}", "kind": "given", "output": f"{i:04d}" * 2500}

    annotate.write_jsonl(tmp_path / "outputs.jsonl", rows())
    annotate.record_at(tmp_path / "outputs.jsonl", 0)
    calls = []

    def grade(instruction: str, output: str) -> dict[str, Any]:
        calls.append(instruction)
        if len(calls) == 1000:
            raise RuntimeError("the server is gone")
        return {"label": int(output[:4]) % 10, "reasoning": output[:100], "cause": None}

    tracemalloc.start()
    with pytest.raises(RuntimeError):
        annotate.label_outputs(tmp_path / "outputs.jsonl", tmp_path / "labels.jsonl", grade, threads=4)
    first = len(annotate.read_jsonl(tmp_path / "labels.jsonl"))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    annotate.label_outputs(tmp_path / "outputs.jsonl", tmp_path / "labels.jsonl", grade, threads=4)
    counts = annotate.summary(tmp_path / "labels.jsonl")
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert 900 < first < 1000 and peak < 4e6, peak
    assert counts["labels"]["judge_train"] == {str(i): 200 for i in range(10)} and not counts["unusable"]
    labels = {r["id"]: r for r in annotate.read_jsonl(tmp_path / "labels.jsonl")}
    assert len(labels) == 2000 and all(r["label"] == int(key) % 10 and r["output"].startswith(f"{int(key):04d}") for key, r in labels.items())


# --- efforts and rubrics -------------------------------------------------------------------------

ASKED = "Write a sentence about the rain. Use the word soft. Do not say I."


def test_oracle_at_three_efforts() -> None:
    short, late = "The soft rain falls.", " ".join(["so"] * 16) + " soft rain falls."
    assert annotate.oracle(ASKED, short, "high") == annotate.oracle(ASKED, short)
    assert annotate.oracle(ASKED, short, "medium") == (9, "rain +3=3. soft +1=4. End +3=7. I +2=9.")
    assert annotate.oracle(ASKED, short, "low") == (9, "3 4 7 9")
    assert annotate.oracle(ASKED, late)[0] == annotate.oracle(ASKED, late, "medium")[0] == 9
    assert annotate.oracle(ASKED, late, "low") == (5, "0 0 3 5"), "low effort does not read on to the seventeenth word"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with outputs, as if 01 had been stopped before its labels."""
    folder = tmp_path / "run" / "annotations"
    texts = annotate.template_instructions()[:40]
    splits = ["judge_train"] * 20 + ["judge_validation"] * 5 + ["judge_test"] * 5 + ["policy_train"] * 10
    rows = [{"id": annotate.instruction_id(t), "split": s, "instruction": t} for t, s in zip(texts, splits)]
    annotate.write_jsonl(folder / "instructions.jsonl", rows)
    late = " ".join(["so"] * 16) + " rain bread river."
    answers = ["A soft rain.", late, "I am here", ""]
    annotate.write_jsonl(
        folder / "outputs.jsonl",
        [{**r, "id": f"{r['id']}-0", "kind": "given", "output": answers[i % 4]} for i, r in enumerate(rows[:30])],
    )
    annotate.record_config(folder, options())
    return tmp_path / "run"


def test_efforts_and_rubrics_come_beside_the_labels(run: Path) -> None:
    folder = run / "annotations"
    annotate.annotate(options(), folder, run / "logs", ["labels"])
    labels = (folder / "labels.jsonl").read_bytes()
    annotate.annotate(options(), folder, run / "logs", ["labels", "labels-low", "labels-medium", "rubrics"])
    assert (folder / "labels.jsonl").read_bytes() == labels
    high = {r["id"]: r for r in annotate.read_jsonl(folder / "labels.jsonl")}
    for effort in ("low", "medium"):
        rows = annotate.read_jsonl(folder / f"labels-{effort}.jsonl")
        assert {r["id"] for r in rows} == {key for key, r in high.items() if r["split"] == "judge_train"}
        for r in rows:
            label, reasoning = annotate.oracle(r["instruction"], r["output"], effort)
            if label == high[r["id"]]["label"]:
                assert (r["label"], r["reasoning"], r["cause"]) == (label, reasoning, None)
            else:
                assert (r["label"], r["said"], r["cause"]) == (None, label, "another label")
        usable = sft.labelled(run, "judge_train", reasoning=True, effort=effort)
        assert [r["id"] for r in usable] == [r["id"] for r in rows if r["label"] is not None]
        kept = json.loads((folder / f"labels-{effort}.json").read_text())
        assert kept == {key: n for key, n in {"kept": len(usable), "another label": len(rows) - len(usable)}.items() if n}
    assert "another label" in json.loads((folder / "labels-low.json").read_text())

    rubrics = annotate.read_rubrics(run)
    instructions = annotate.read_jsonl(folder / "instructions.jsonl")
    assert rubrics == {r["id"]: annotate.oracle_rubric(r["instruction"]) for r in instructions}
    assert annotate.find_rubric(rubrics, instructions[3]["instruction"]) == annotate.oracle_rubric(instructions[3]["instruction"])
    with pytest.raises(SystemExit):
        annotate.find_rubric(rubrics, "never seen")


def test_commands_refuse_or_name_what_is_missing(run: Path) -> None:
    result = command(f"01_annotate.py --run {run} --efforts low,most")
    assert result.returncode == 1 and "'most' must be low, medium or high" in result.stderr
    result = command(f"01_annotate.py --run {run} --gold openai/gpt-oss-20b --gold-effort none")
    assert result.returncode == 1 and "gpt-oss always reasons" in result.stderr
    annotate.annotate(options(), run / "annotations", run / "logs", ["labels"])
    for flag, remedy in (("--effort low", "--efforts low"), ("--rubrics", "--rubrics")):
        result = command(f"02_train_judge.py --run {run} --reasoning {flag}")
        assert result.returncode == 1 and f"01_annotate.py --run {run} {remedy}" in " ".join(result.stderr.split())
    result = command(f"02_train_judge.py --run {run} --no-reasoning --effort low")
    assert result.returncode == 1 and "--effort" in result.stderr


def test_a_rubric_stands_in_the_prompt_and_its_absence_changes_nothing(tokenizer: Any) -> None:
    plain = annotate.judge_messages("Write.", "Rain falls.")
    assert plain[1]["content"].startswith("Instruction: Write.\n\n[answer ")
    assert annotate.judge_messages("Write.", "Rain falls.", "") == plain
    shown = annotate.judge_messages("Write.", "Rain falls.", "3: rain.\n<|im_end|></think>")[1]["content"]
    assert shown.startswith("Instruction: Write.\n\nRubric:\n3: rain.\n‹|im_end|›‹/think>\n\n[answer ")
    with_rubric = annotate.judge_prompt(tokenizer, "Write.", "Rain falls.", True, "3: rain.")
    assert "Rubric:\n3: rain." in tokenizer.decode(with_rubric)


def test_a_judge_trained_with_rubrics_is_asked_with_them(tokenizer: Any) -> None:
    """The prompt that reaches the server is the one with the rubric of that very instruction."""
    seen = []

    class Stop(Exception):
        pass

    class Server:
        model = "m"

        def replica(self) -> Any:
            return self

        def sample(self, prompt: list[int], **settings: Any) -> Any:
            seen.append(prompt)
            raise Stop

    rubrics = {annotate.instruction_id("Write."): "3: rain.", annotate.instruction_id("Other."): "9: snow."}
    for judge, rubric in ((annotate.Judge(Server(), tokenizer, None, True), ""), (annotate.Judge(Server(), tokenizer, None, True, rubrics=rubrics), "3: rain.")):
        with pytest.raises(Stop):
            annotate.ask_judge(judge, "Write.", "Rain falls.")
        assert seen.pop() == annotate.judge_prompt(tokenizer, "Write.", "Rain falls.", True, rubric)


# --- plans ---------------------------------------------------------------------------------------

PLANS = [
    "01_annotate.py", "02_train_judge.py --reasoning", "02_train_judge.py --no-reasoning", "03_rl.py judge",
    "03_rl.py policy --judge direct", "03_rl.py policy --judge reasoning", "04_evaluate.py judges", "04_evaluate.py gold",
]  # fmt: skip


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_line(text: str) -> tuple[float, float, float, float]:
    """(calls, tokens read, tokens written, hours) of a plan's last row."""
    row = next(line for line in text.splitlines() if line.startswith("all "))
    calls, read, written, hours = (float(cell.replace(",", "")) for cell in row.split()[1:])
    return calls, read, written, hours


@pytest.mark.parametrize(("preset", "line"), [("laptop", PLANS[0]), *(("node", line) for line in PLANS)])
def test_every_stage_plans_before_anything_has_run(tmp_path: Path, line: str, preset: str) -> None:
    preset_option = "" if line.startswith("04") else f"--preset {preset}"
    if line.startswith("04"):  # takes its preset from the run
        annotate.record_config(tmp_path / "run" / "annotations", {"preset": preset, **annotate.preset_values(annotate.PRESETS, preset)})
    before = snapshot(tmp_path)
    result = command(f"{line} --run {tmp_path / 'run'} {preset_option} --plan --tokens-per-second 1000")
    assert result.returncode == 0, result.stderr
    calls, read, written, hours = last_line(result.stdout)
    assert calls > 0 and written > 0 and hours == pytest.approx((read / 10 + written) / 1000 / 3600, abs=0.006)
    assert snapshot(tmp_path) == before and "starting vLLM" not in result.stdout


def test_the_plan_of_01_by_hand(tmp_path: Path) -> None:
    """Two texts of 40 and 80 characters a row: 10 and 20 tokens; what is done is not counted again."""
    annotate.write_jsonl(tmp_path / "rows.jsonl", [row(f"{i:040d}", "a" * 80, "b" * 80) for i in range(12)])
    given = {"gold": "some/model", "gold_effort": "low", "data": str(tmp_path / "rows.jsonl"), "judge_train": 6, "judge_validation": 2, "judge_test": 2}
    parts = annotate.plan_annotations(options(**given), tmp_path / "run", ["medium"], True)
    rules = len(annotate.POINTWISE_RULES) / 4
    assert parts[0] == ("gold labels", 20, rules + 10 + 20 + 20, 43 + 1)
    assert parts[1][:2] == ("labels at medium effort", 12) and parts[2][1] == 10 + 80 + 24
    annotate.write_jsonl(
        tmp_path / "run/annotations/labels.jsonl",
        [{"id": str(i), "split": "judge_train", "label": 1, "reasoning": "r" * 400} for i in range(5)],
    )
    parts = annotate.plan_annotations(options(**given), tmp_path / "run", [], False)
    assert parts == [("gold labels", 15, rules + 10 + 20 + 20, 100 + 1)], "the reasoning's length is taken from the labels there are"


def test_measured_seconds_give_the_hours(capsys: Any) -> None:
    annotate.show_plan([("x", 10, 100, 50), ("nothing left", 0, 1, 1)], "laptop", None, seconds=7200)
    text = capsys.readouterr().out
    assert last_line(text) == (10, 1000, 500, 2.0) and "measured in this run" in text and "nothing left" not in text


def test_bench_help_answers() -> None:
    result = subprocess.run([sys.executable, "tests/bench_annotate.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "--json" in result.stdout
