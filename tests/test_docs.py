"""README, docs/ and code say the same: commands, options, paths, names, and every figure of a marked table.

Such a table stands under `<!-- figures FILE: KEY KEY … -->`: one key for each number, row by row, without the
first column. A key is a path through FILE: `{a,b}` is both in turn, `*100` is per cent, and `mean:`, `min:`
or `max:` takes all that `*` and `?` fit. A FILE with a `*` is several, each under what the `*` stands for.
`…` in a table is a figure that is awaited.
"""

import ast
import json
import re
import shlex
import subprocess
from fnmatch import fnmatch
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import ROOT, annotate
from typer.main import get_command

evaluate = import_module("04_evaluate")
FOLDERS = ("", "docs", "results", "tests/forks", "tests/course")
FILES = [path for where in FOLDERS for path in (ROOT / where).glob("*.md")]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(FILES)}
SCRIPTS = sorted(ROOT.glob("0*.py"))
TABLE = r"\n((?:\|[^\n]*\n)+)"
FIGURES = re.compile(rf"<!-- figures ([^:]+): (.*?) -->{TABLE}", re.DOTALL)
AWAITED = "…"


def command_lines(text: str | None) -> list[str]:
    """Every `python 0X_….py …` of a text, without what follows it."""
    return [line.strip() for line in re.findall(r"python (0\d_\w+\.py.*?)(?=`|\n| #| \|\||$)", text or "")]


def parse(line: str) -> None:
    """Read a command line as typer would, types and required options included; nothing is run."""
    script, *words = shlex.split(line)
    command: Any = get_command(import_module(Path(script).stem).app)
    command = command.commands[words.pop(0)] if hasattr(command, "commands") else command
    context = command.context_class(command)
    given, rest, _ = command.make_parser(context).parse_args(words)  # raises for an unknown option
    assert not rest, f"{line}: {rest}"
    for option in command.params:
        assert option.name in given or not option.required, f"{line}: needs --{option.name}"
        if option.name in given:
            option.callback = None if option.is_eager else option.callback  # these read the run's folder
            option.process_value(context, given[option.name])  # raises for a value of another type or range


LINES = [(page, line) for page, text in PAGES.items() for line in command_lines(text)]
DOCSTRINGS = {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in SCRIPTS}
LINES += [(name, line) for name, text in DOCSTRINGS.items() for line in command_lines(text)]


@pytest.mark.parametrize(("where", "line"), LINES)
def test_a_documented_command_is_understood(where: str, line: str) -> None:
    parse(line)


def test_the_makefiles_commands_are_understood() -> None:
    how = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    make = ["make", "-n", "demo", "look", "study", "SEEDS=0"]
    for line in command_lines(subprocess.run(make, **how).stdout):
        parse(line)


@pytest.mark.parametrize("page", PAGES)
def test_links_names_and_tests_exist(page: str) -> None:
    text = PAGES[page]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert "://" in target or path.exists(), target
        if anchor and "://" not in target:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target
    for name, script in re.findall(r"`(\w+)` in `(0\d_\w+\.py)`", text):
        assert hasattr(import_module(Path(script).stem), name), f"{name} in {script}"
    for file, several, one in re.findall(r"pytest (tests/\w+\.py) -k (?:\"([^\"]+)\"|(\w+))", text):
        names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
        for word in (several or one).split(" or "):
            assert any(word in name for name in names), f"{file} -k {word}"


def test_the_readme_is_short_and_names_every_command_and_what_to_cite() -> None:
    text, citation = PAGES["README.md"], (ROOT / "CITATION.cff").read_text()
    assert len(text.split()) <= 2000
    assert text.split("\n")[0].removeprefix("# ") in citation and "2603.12246" in text
    text += "".join(PAGES[page] for page in PAGES if page.startswith("docs/") and f"]({page}" in text)
    for path in SCRIPTS:
        for name in getattr(get_command(import_module(path.stem).app), "commands", [""]):
            assert f"{path.name} {name}".strip() in text


def look(data: Any, path: list[str]) -> list[Any]:
    """What `path` leads to in `data`: one value, or more where it has a `*` or `?`."""
    if not path:
        return [data]
    if isinstance(data, list):
        here = data if path[0] == "*" else [data[int(path[0])]]
    else:
        here = [data[key] for key in data if fnmatch(key, path[0])]
    assert here, path
    return [value for part in here for value in look(part, path[1:])]


def load(file: str) -> Any:
    """A JSON or JSONL file; of a `file` with a `*`: what the `*` stands for -> that file."""
    if "*" in file:
        place, several = file.split("/").index("*"), [path.relative_to(ROOT) for path in ROOT.glob(file)]
        return {path.parts[place]: load(str(path)) for path in several}
    text = (ROOT / file).read_text()
    return [json.loads(line) for line in text.splitlines()] if file.endswith(".jsonl") else json.loads(text)


def figures(file: str, keys: str) -> list[tuple[str, float | None]]:
    """(key, figure) of each of `keys`, braces expanded, the last one fastest."""
    data, found = load(file), []
    for key in keys.split():
        for parts in product(*([p.split(","), [p]][i % 2 == 0] for i, p in enumerate(re.split("[{}]", key)))):
            how, _, path = "".join(parts).rpartition(":")
            known = [v for v in look(data, path.removesuffix("*100").split(".")) if v is not None]
            scale, pick = 100 if "*100" in path else 1, {"min": min, "max": max}.get(how, fmean)
            found.append((path, scale * pick(known) if known else None))
    return found


@pytest.mark.parametrize(("file", "keys", "table"), FIGURES.findall("\n".join(PAGES.values())))
def test_every_figure_is_the_one_in_its_file(file: str, keys: str, table: str) -> None:
    rows = [line[1:].partition("|")[2] for line in table.splitlines()[2:]]
    if AWAITED in "".join(rows):
        pytest.skip("figures are awaited")
    shown, known = re.findall(r"[+−-]?\d+(?:\.\d+)?|none", "\n".join(rows)), figures(file, keys)
    assert len(shown) == len(known)
    for text, (key, value) in zip(shown, known):
        wanted = "none" if value is None else f"{value:.{len(text.partition('.')[2])}f}"
        assert text.replace("−", "-").strip("+") == wanted, key


def marked(kind: str, body: str) -> Any:
    """(argument, body) of the README's only part under `<!-- kind argument -->`, unless it is awaited."""
    (found,) = re.findall(rf"<!-- {kind} (.*?) -->\n{body}", PAGES["README.md"])
    if AWAITED in found[1].replace(f" {AWAITED}", ""):  # an output cut short ends in " …"
        pytest.skip("results are awaited")
    return found


def test_the_readme_shows_the_findings_of_the_shipped_run() -> None:
    run, text = marked("findings", r"```\n([^`]*)\n```")
    assert text.splitlines() == evaluate.findings(ROOT / run)


def test_the_readmes_outputs_are_the_examples_of_the_shipped_run() -> None:
    """All of them, in their order; spaces around arrows and most of the instruction are left out."""
    run, table = marked("examples", TABLE.removeprefix(r"\n"))
    rows, frame = table.splitlines()[2:], evaluate.examples(ROOT / run)
    scores = [key for key in evaluate.SCORES if key in frame]
    assert len(rows) == len(frame)
    for line, row in zip(rows, frame.to_dict("records")):
        policy, about, *cells = re.split(r"(?<!\\)\|", line.strip("|"))
        wanted = [row["before"], row["after"], *(row[key].replace(" ", "") for key in scores)]
        assert policy == row["policy"] and f" about the {about}." in row["instruction"]
        assert [cell.replace(r"\|", "|") for cell in cells] == wanted


def test_the_readme_counts_the_seeds_that_show_each_finding(tmp_path: Path) -> None:
    files, table = marked("counts", TABLE.removeprefix(r"\n"))
    shown: list[list[str]] = [[], [], []]
    for file in files.split():
        lines = []
        for seed, results in load(file).items():
            for name in ("gold", "judges"):
                annotate.write_json(tmp_path / seed / "evaluation" / f"{name}.json", results[name])
            lines += evaluate.findings(tmp_path / seed)
        for number, cells in enumerate(shown, 1):
            count = sum(line.startswith(f"finding {number}: shown") for line in lines)
            cells.append(f"{count} of {len(load(file))}")
    assert [line.strip("|").split("|")[1:] for line in table.splitlines()[2:]] == shown


def test_hours_and_memory_of_the_hardware_page_are_those_of_the_formulas() -> None:
    cost, lines = import_module("cost"), PAGES["docs/hardware.md"].splitlines()
    cards = [("gpu", "gpu-24GB", False), ("gpu", "gpu-80GB", True), ("node", "node", True)]
    columns = [[hours for _, hours in cost.stages(p, cost.CARDS[card], large)] for p, card, large in cards]
    wanted = [
        [f"{hours:.1f}" for hours in row] for row in zip(*[[*column, sum(column)] for column in columns])
    ]
    first = next(n for n, line in enumerate(lines) if line.startswith("|01, high effort|"))
    assert [line.strip("|").split("|")[1:] for line in lines[first : first + len(wanted)]] == wanted
    shapes = {re.sub("-Instruct", "", name): name for name in cost.SHAPES}
    for line in lines:
        if found := re.fullmatch(r"\|([\w.-]+), (\d+)\|.*\|([\d.]+)\|(\d+)\|", line):
            name, rank, with_checkpoints, without = found.groups()
            sums = [
                sum(cost.memory(shapes[name], 8192, 8192, int(rank), 2, c).values()) for c in (True, False)
            ]
            assert (f"{sums[0] / 1e9:.1f}", f"{sums[1] / 1e9:.0f}") == (with_checkpoints, without), name
            shapes.pop(name)
    assert list(shapes) == ["SmolLM2-135M"]


def test_the_settings_shown_are_the_defaults() -> None:
    cost, readme, page = import_module("cost"), PAGES["README.md"], PAGES["docs/fidelity.md"]
    for preset in ("laptop", "node"):
        one, two, *loops = cost.all_options(preset)
        for o in loops:
            rate = f"{o['lr']:.0e}".replace("e-0", "e-")
            steps = f"{o['minibatches']} minibatches, {o['steps']} steps"
            assert f"|{rate}, {o['prompts']} × {o['group']}, {steps}" in page
        if preset == "laptop":
            assert f"{one['judge_train']} instructions by template, {one['outputs']} outputs each" in page
            assert f"same {one['judge_train'] * one['outputs']} examples" in readme
            rate = f"{two['lr']:.0e}".replace("e-0", "e-")
            assert f"|{rate}, batch {two['batch']}; {two['epochs']} epoch" in page
