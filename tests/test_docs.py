"""README and code say the same: commands, options, paths, names, and every figure of a marked table.

Such a table stands under `<!-- figures FILE: KEY KEY … -->`: one key for each number, row by row, without the
first column. A key is a path through FILE: `{a,b}` is both in turn, `*100` is per cent, and `mean:`, `min:`
or `max:` takes all that `*` and `?` fit.
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
from conftest import ROOT
from typer.main import get_command

FOLDERS = (".", "results", "tests/forks", "tests/course")
PAGES = {page: (ROOT / page / "README.md").read_text() for page in FOLDERS}
SCRIPTS = sorted(ROOT.glob("0*.py"))
MARKER = r"\{\{[\w.]+\}\}"
FIGURES = re.compile(r"<!-- figures ([^:]+): (.*?) -->\n((?:\|[^\n]*\n)+)", re.DOTALL)


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
    for line in command_lines(subprocess.run(["make", "-n", "demo", "study", "SEEDS=0"], **how).stdout):
        parse(line)


@pytest.mark.parametrize("page", PAGES)
def test_links_names_and_tests_exist(page: str) -> None:
    text = PAGES[page]
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        awaited = "{{" in text and target.endswith(".png")
        assert "://" in target or awaited or (ROOT / page / target).exists(), target
    for name, script in re.findall(r"`(\w+)` in `(0\d_\w+\.py)`", text):
        assert hasattr(import_module(Path(script).stem), name), f"{name} in {script}"
    for file, several, one in re.findall(r"pytest (tests/\w+\.py) -k (?:\"([^\"]+)\"|(\w+))", text):
        names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
        for word in (several or one).split(" or "):
            assert any(word in name for name in names), f"{file} -k {word}"


def test_the_readme_is_short_and_names_every_command_and_what_to_cite() -> None:
    text, citation = PAGES["."], (ROOT / "CITATION.cff").read_text()
    assert len(re.sub("<!--.*?-->", "", text, flags=re.DOTALL).split()) <= 2500
    assert text.split("\n")[0].removeprefix("# ") in citation and "2603.12246" in text
    for path in SCRIPTS:
        for name in getattr(get_command(import_module(path.stem).app), "commands", [""]):
            assert f"{path.name} {name}".strip() in text


def look(data: Any, path: list[str]) -> list[Any]:
    """What `path` leads to in `data`: one value, or more where it has a `*` or `?`."""
    if not path:
        return [data]
    here = [data[int(path[0])]] if isinstance(data, list) else [data[k] for k in data if fnmatch(k, path[0])]
    assert here, path
    return [value for part in here for value in look(part, path[1:])]


def figures(file: str, keys: str) -> list[tuple[str, float | None]]:
    """(key, figure) of each of `keys`, braces expanded, the last one fastest."""
    data, found = json.loads((ROOT / file).read_text()), []
    for key in keys.split():
        for parts in product(*([p.split(","), [p]][i % 2 == 0] for i, p in enumerate(re.split("[{}]", key)))):
            how, _, path = "".join(parts).rpartition(":")
            known = [v for v in look(data, path.removesuffix("*100").split(".")) if v is not None]
            scale, pick = 100 if "*100" in path else 1, {"min": min, "max": max}.get(how, fmean)
            found.append((path, scale * pick(known) if known else None))
    return found


@pytest.mark.parametrize(("file", "keys", "table"), FIGURES.findall("\n".join(PAGES.values())))
def test_every_figure_is_the_one_in_its_file(file: str, keys: str, table: str) -> None:
    if re.search(MARKER, table):
        pytest.skip("markers remain")
    rows = [line.strip("|").partition("|")[2] for line in table.splitlines()[2:]]
    shown, known = re.findall(r"[+−-]?\d+(?:\.\d+)?|none", "\n".join(rows)), figures(file, keys)
    assert len(shown) == len(known)
    for text, (key, value) in zip(shown, known):
        wanted = "none" if value is None else f"{value:.{len(text.partition('.')[2])}f}"
        assert text.replace("−", "-").strip("+") == wanted, key
