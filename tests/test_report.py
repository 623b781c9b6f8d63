"""The page of `05_attack_analysis.py report`: nothing of a model becomes HTML, nothing is lost, nothing is loaded."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command
from hypothesis import given
from hypothesis import strategies as st

annotate = import_module("01_annotate")
attack = import_module("05_attack_analysis")

TEMPLATE = (ROOT / "05_report_template.html").read_text(encoding="utf-8")
HOSTILE = [
    "</script><img src=x onerror=alert(1)>", "<!--<script>", "-->", "]]>", "&lt;b&gt; & \"quotes' \\", "</SCRIPT\n>",
    "__data__ __script__ __style__", "\u2028\u2029\x00", "\u202eabc\u202c", "\ud800", "😀 مرحبا", "",
]  # fmt: skip
REFUSAL = " I cannot help with this request, as the platform policy forbids it."


class Reader(HTMLParser):
    """The start tags of a page, in order, and the text within each script and style."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: dict[str, str] = {}
        self.inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id", tag) if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, text: str) -> None:
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + text


def read_data(path: Path) -> dict[str, Any]:
    return json.loads(Reader(path.read_text(encoding="utf-8")).texts["data"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one finished policy, one of its outputs for each hostile text, and some rollouts."""
    run = tmp_path / "run"
    texts = dict(enumerate(HOSTILE))
    annotate.write_json(run / "policies" / "direct" / "policy.json", {"judge": "direct-sft"})

    def lines(name: str, records: list[dict[str, Any]]) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("".join(json.dumps(r) + "\n" for r in records))

    lines("policies/direct/metrics.jsonl", [{"step": 0, "reward": 4.0}, {"step": 1, "reward": None}])
    lines("policies/direct/rollouts.jsonl", [
        {"id": f"0-{i}", "step": 0, "instruction": "Write.", "completion": f"rain {i}", "finished": True, "reward": i / 2, "label": 5, "thinking": "Hm."}
        for i in range(4)
    ])  # fmt: skip
    lines("evaluation/outputs.jsonl", [
        {"id": f"direct:4:{i}", "policy": "direct", "step": 4, "instruction": f"Write {text}", "output": text, "finished": False} for i, text in texts.items()
    ])  # fmt: skip
    lines("evaluation/scores/direct-sft.jsonl", [{"id": f"direct:4:{i}", "expected": i / 2 or None, "label": i % 10 or None, "thinking": text} for i, text in texts.items()])
    lines("evaluation/scores/gold.jsonl", [{"id": f"direct:4:{i}", "expected": 9 - i % 9, "label": 9 - i % 9, "reasoning": "because"} for i in texts])
    lines("attacks/scores/base.jsonl", [{"id": "direct:4:3", "expected": 1.5, "label": 1, "thinking": ""}])
    annotate.write_json(run / "evaluation" / "judges.json", {"base": {"alpha": float("nan"), "n": 1}})
    return run


def test_a_page_from_the_command_line_holds_every_output_with_its_scores(run: Path) -> None:
    done = command(f"05_attack_analysis.py report --run {run}")
    assert done.returncode == 0, done.stderr
    data = read_data(run / "report.html")
    assert data["run"] == str(run) and data["left_out"] == 0
    evaluated, rollouts = data["outputs"][: len(HOSTILE)], data["outputs"][len(HOSTILE) :]
    assert [o["output"] for o in evaluated] == HOSTILE
    assert [data["instructions"][o["instruction"]] for o in evaluated] == [f"Write {text}" for text in HOSTILE]
    assert {(o["source"], o["policy"], o["own"], o["step"], o["finished"]) for o in evaluated} == {("evaluation", "direct", "direct-sft", 4, False)}
    for i, o in enumerate(evaluated):
        expected = {"direct-sft": [i / 2 or None, i % 10 or None, HOSTILE[i]], "gold": [9 - i % 9, 9 - i % 9, "because"]}
        assert o["scores"] == expected | ({"base": [1.5, 1, ""]} if i == 3 else {})
    assert [(o["output"], o["source"], o["scores"]) for o in rollouts] == [
        (f"rain {i}", "training", {"direct-sft": [i / 2, 5, "Hm."]}) for i in range(4)
    ]  # fmt: skip
    assert data["training"] == {"direct": [[0, 4.0], [1, None]]}
    assert data["judges"] == {"base": {"alpha": None, "n": 1}}  # NaN is not JSON


def test_nothing_of_a_model_becomes_html(run: Path) -> None:
    page = attack.write_report(run, 100).read_text(encoding="utf-8")
    ours, theirs = Reader(page), Reader(TEMPLATE)
    assert [tag for tag, _ in ours.tags] == [tag for tag, _ in theirs.tags]
    # Outside its one line of data the page is the template, up to the two hashes.
    block = json.dumps(ours.texts["data"])
    assert block.isascii() and not set("<>&") & set(ours.texts["data"])
    rest = re.sub(r"sha256-[\w+/=]+", "sha256-", page.replace(ours.texts["data"], "__data__"))
    assert rest == re.sub(r"sha256-[\w+/=]+", "sha256-", TEMPLATE)


@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(HOSTILE)), max_size=6).map("".join))
def test_any_text_comes_back_from_the_page(text: str) -> None:
    page = attack.fill(TEMPLATE, {text: [text, None, 1.5, float("inf")]})
    reader = Reader(page)
    assert json.loads(reader.texts["data"]) == {text: [text, None, 1.5, None]}
    assert len(reader.tags) == len(Reader(TEMPLATE).tags)


def test_the_page_may_run_its_own_script_and_load_nothing(run: Path) -> None:
    reader = Reader(attack.write_report(run, 100).read_text(encoding="utf-8"))
    (policy,) = [a["content"] for tag, a in reader.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert set(rules) == {"default-src", "style-src", "script-src", "base-uri", "form-action"}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(reader.texts[name].encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    # Style and handlers in attributes would be refused by that policy; addresses lead to the page itself.
    for tag, attributes in reader.tags:
        assert not [key for key in attributes if key in ("style", "src", "action", "srcset") or key.startswith("on")], tag
        assert attributes.get("href", "#").startswith("#")
    code = TEMPLATE.split("<style>")[1].replace("http://www.w3.org/2000/svg", "", 1)  # a name, not an address
    forbidden = r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|\beval|new Function|@import|url\(|fetch\(|XMLHttp|WebSocket"
    assert not re.findall(forbidden, code)


def test_marked_places_count_as_the_browser_counts() -> None:
    text = "\ud800 😀 مرحبا 😀" + REFUSAL + " 😀 [END OF RESPONSE] 😀"
    found = attack.find_patterns("Write a poem.", text)
    assert found
    units = text.encode("utf-16-le", "surrogatepass")
    for (component, start, end), (name, first, last) in zip(found, attack.spans("Write a poem.", text), strict=True):
        assert name == component and units[2 * first : 2 * last].decode("utf-16-le", "surrogatepass") == text[start:end]


def test_every_part_may_be_missing(tmp_path: Path) -> None:
    data = read_data(attack.write_report(tmp_path, 100))
    assert data["outputs"] == [] and data["training"] == {}
    known = {"04_evaluate.py": import_module("04_evaluate").app, "05_attack_analysis.py": attack.app}
    for key in (*attack.PARTS, *attack.MORE_PARTS):
        assert not data[key]
        script, name = data["commands"][key].removeprefix("python ").split()[:2]
        assert name in {c.name for c in known[script].registered_commands}, f"{key}: there is no {script} {name}"
    nowhere = command(f"05_attack_analysis.py report --run {tmp_path / 'nowhere'}")
    assert nowhere.returncode == 1 and "01_annotate.py" in nowhere.stderr and not (tmp_path / "nowhere").exists()


def test_batteries_and_the_table_of_prompts_are_told_apart(run: Path) -> None:
    folder = run / "attacks" / "battery"
    attacks = {"empty": {"success_rate": 0.5, "success_ci": [0.2, 0.8], "lift": 1.0, "ci": [0.1, 2.0], "n": 4}}
    for judge in ("base", "<script>"):
        annotate.write_json(folder / f"{judge}.json", {"judge": judge, "attacks": attacks})
    annotate.write_json(folder / "harden.json", {"base, plain": {"success": 25.0}})
    data = read_data(attack.write_report(run, 100))
    assert data["battery"] == {"base": attacks, "<script>": attacks} and data["harden"] == {"base, plain": {"success": 25.0}}
    assert set(data["components"]) == set(attack.COMPONENTS)


def test_long_texts_and_many_outputs_keep_the_page_small(run: Path) -> None:
    row = {"policy": "direct", "step": 4, "instruction": "Write.", "finished": True}
    path = run / "evaluation" / "outputs.jsonl"
    annotate.write_jsonl(path, [{**row, "id": "long", "output": "A" * 1_000_000 + REFUSAL}, *({**row, "id": f"{i}", "output": "rain"} for i in range(50))])
    data = read_data(attack.write_report(run, 100))
    long = next(o for o in data["outputs"] if o["id"] == "long")
    assert long["output"].startswith("A" * attack.LONGEST + f" [… {980_000 + len(REFUSAL)} more") and (run / "report.html").stat().st_size < 150_000
    assert long["spans"] == []  # what is not shown is not marked
    assert (len(data["outputs"]), data["left_out"]) == (55, 0)
    # The rest is drawn from the rollouts first: the evaluated outputs have a gold score.
    for most, evaluated, rollouts in ((52, 51, 1), (51, 51, 0), (7, 7, 0)):
        data = read_data(attack.write_report(run, most))
        kinds = [o["source"] for o in data["outputs"]]
        assert (kinds.count("evaluation"), kinds.count("training"), data["left_out"]) == (evaluated, rollouts, 55 - most)
