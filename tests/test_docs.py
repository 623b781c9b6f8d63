"""README, docstrings, Makefile and options say the same: commands, options, paths, names, links."""

import ast
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from typer.main import get_command

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("0*.py"))
SPANS = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)  # what stands in backticks
# (script, command) -> the command as typer built it; "" is the command of a script that has only one
COMMANDS: dict[tuple[str, str], Any] = {}
for path in SCRIPTS:
    built = get_command(import_module(path.stem).app)
    COMMANDS |= {(path.name, name): command for name, command in getattr(built, "commands", {"": built}).items()}
OPTIONS = {opt for command in COMMANDS.values() for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
# Options that a diff in tests/forks adds, or that belong to a script in tests/.
OTHERS = "".join(p.read_text() for p in (*ROOT.glob("tests/forks/*.diff"), *ROOT.glob("tests/*.py")) if p != Path(__file__)).replace("_", "-")


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def command_lines(text: str) -> list[str]:
    """Every `python 0X_….py …` of a text, without the comment behind it."""
    return [line.split("  #")[0].strip() for line in re.findall(r"python (0\d_\w+\.py[^`\n]*)", text)]


def parse(line: str) -> None:
    """Read a command line as typer would, types and required options included; nothing is run."""
    script, *arguments = shlex.split(line)
    assert (ROOT / script).exists(), line
    name = "" if (script, "") in COMMANDS else arguments.pop(0)
    assert (script, name) in COMMANDS, f"no such command: {line}"
    COMMANDS[script, name].make_context(name or script, arguments)  # raises what the user would see


DOCUMENTED = [("README.md", line) for line in command_lines(README)]
DOCUMENTED += [(path.name, line) for path in (*SCRIPTS, *sorted(ROOT.glob("tests/*.py"))) for line in command_lines(docstring(path))]


@pytest.mark.parametrize(("where", "line"), DOCUMENTED, ids=[f"{where}: {line}" for where, line in DOCUMENTED])
def test_a_documented_command_is_understood(where: str, line: str) -> None:
    parse(line)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not here")
def test_the_makefiles_commands_are_understood() -> None:
    lines = command_lines(subprocess.run(["make", "-n", "demo", "study", "SEEDS=0"], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert len(lines) > 20
    for line in lines:
        parse(line)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets >= set(re.findall(r"`?make ([a-z-]+)", "\n".join([*SPANS, *re.findall(r"^make .*", README, re.MULTILINE)])))


def test_commands_named_in_passing_exist() -> None:
    """`battery --judge gold`, and the commands that an error message tells the user to run."""
    names = {name for _, name in COMMANDS}
    for span in SPANS:
        first, *rest = span.split()
        if first in names and rest and rest[0].startswith("--"):
            known = {opt for (_, name), command in COMMANDS.items() if name == first for p in command.params for opt in p.opts}
            assert {word for word in rest if word.startswith("--")} <= known, span
    for path in SCRIPTS:
        for script, word in re.findall(r"(0\d_\w+\.py) ([a-z][a-z-]*)(?= --| \{|[\"'`)])", path.read_text()):
            assert (script, word) in COMMANDS, f"{path.name}: {script} {word}"


def test_options_named_in_passing_exist() -> None:
    texts = {"README.md": re.sub(r"pip install.*|pytest .*", "", README)}
    texts |= {path.name: docstring(path) for path in SCRIPTS}
    texts |= {f"help of {' '.join(key)}": " ".join(p.help or "" for p in command.params) for key, command in COMMANDS.items()}
    for where, text in texts.items():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert option in OPTIONS or option.removeprefix("--") in OTHERS, f"{where}: {option}"


@pytest.mark.parametrize(("script", "name"), COMMANDS)
def test_every_command_is_in_the_readme_and_every_option_has_its_help(script: str, name: str) -> None:
    command = COMMANDS[script, name]
    assert f"{script} {name}".strip() in README and command.help
    assert [p.name for p in command.params if not (p.help or "").split("[laptop")[0].strip()] == []


def test_paths_and_links_of_the_readme_are_alive() -> None:
    tops = {path.name for path in ROOT.iterdir() if path.name not in ("runs", "models")}
    ours = [span for span in SPANS if " " not in span and (span.split("/")[0] in tops or re.fullmatch(r"\w+\.(py|toml|cff)", span))]
    assert len(ours) > 20
    for span in ours:
        assert any(ROOT.glob(span.rstrip("/"))), span
    headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)", README, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target


def test_names_in_the_readme_are_defined_where_it_says() -> None:
    named = [(name, script) for name, script in re.findall(r"`([A-Za-z_]+)` in\s+`(0\d_\w+\.py)`", README)]
    assert len(named) > 8
    for name, script in named:
        assert hasattr(import_module(Path(script).stem), name), f"{name} in {script}"


def test_functions_commands_and_fields_of_the_stages_exist() -> None:
    """The numbered list: a name is of that stage or an earlier one; a field of the metrics is written by it."""
    stages = re.findall(r"^(\d)\. \*\*(.+?)(?=^\d\. \*\*|^$)", README, re.MULTILINE | re.DOTALL)
    assert [number for number, _ in stages] == list("12345")
    scripts = sorted(ROOT.glob("0*.py"))
    for number, text in stages:
        names = re.findall(r"`([a-z_]+)`", text)
        assert len(names) > 1 or number == "4"
        for name in names:
            known = any(hasattr(import_module(script.stem), name) for script in scripts[: int(number)])
            command = (scripts[int(number) - 1].name, name) in COMMANDS
            assert known or command or f'"{name}": ' in scripts[int(number) - 1].read_text(), f"{name} of stage {number}"


def test_tests_named_in_the_readme_exist() -> None:
    """Each word of a `-k` names a test of that file; a bare `test_…` one of any file."""
    defined = {p: re.findall(r"^def (test_\w+)", p.read_text(), re.MULTILINE) for p in ROOT.glob("tests/test_*.py")}
    runs = re.findall(r"pytest (tests/\w+\.py)(?: -k (?:\"([^\"]+)\"|(\w+)))?", README)
    assert len(runs) >= 6
    for file, several, one in runs:
        for word in (several or one).split(" or "):
            assert any(word in name for name in defined[ROOT / file]), f"{file} -k {word}"
    everything = {name for names in defined.values() for name in names}
    assert {span for span in SPANS if re.fullmatch(r"test_\w+", span)} <= everything
    assert f"{len(import_module('mutations').MUTATIONS)} faults" in README


def test_the_citation_names_this_software_and_the_paper() -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"] and citation["type"] == "software"
    assert f"# {citation['title']}\n" in README and "Apache" in citation["license"]
    (paper,) = citation["references"]
    assert paper["type"] and paper["authors"] and paper["title"] in " ".join(README.split()) and "2603.12246" in paper["url"]
