"""Closed doors: nothing but loopback listens, the key shows nowhere, no code or pickle comes from outside."""

import ast
import os
import re
import socket
import stat
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, processes_naming
from typer.main import get_command

annotate = import_module("01_annotate")
SCRIPTS = sorted(ROOT.glob("0*.py"))


def calls(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(dotted name, keyword arguments as source) of every call in a script."""
    return [
        (ast.unparse(node.func), {k.arg or "**": ast.unparse(k.value) for k in node.keywords})
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_shell_no_pickle_no_remote_code(path: Path) -> None:
    for name, keywords in calls(path):
        assert name not in ("eval", "exec", "os.system", "os.popen", "torch.load", "subprocess.getoutput"), name
        assert not re.search(r"pickle|joblib|yaml\.load$", name), name
        assert keywords.get("shell", "False") == "False" and keywords.get("trust_remote_code", "False") == "False", name
        if name.endswith("CausalLM.from_pretrained") and "gguf_file" not in keywords:
            assert keywords.get("use_safetensors") == "True", name
    text = path.read_text()
    assert "0.0.0.0" not in text and not re.search(r"^\s*(import|from) (pickle|marshal|shelve)", text, re.MULTILINE)


def test_servers_are_asked_for_loopback_and_safetensors_alone() -> None:
    text = (ROOT / "01_annotate.py").read_text()
    assert '"--host", "127.0.0.1"' in text and '"--load-format", "safetensors"' in text and "--trust-remote-code" not in text
    assert "--api-key" not in text, "a key on the command line is shown by ps"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_option_takes_a_key(path: Path) -> None:
    """A key on a command line would be shown by ps and kept in config.json: keys come from the environment."""
    command: Any = get_command(import_module(path.stem).app)
    for sub in getattr(command, "commands", {"": command}).values():
        assert not [p.name for p in sub.params if re.search("key|token$|secret|password", p.name or "")]


def test_errors_do_not_show_the_key() -> None:
    endpoint = annotate.Endpoint("http://127.0.0.1:9/v1", "my-secret-key", "m")
    with pytest.raises(annotate.ServerError) as error, endpoint.errors():
        raise ValueError("refused: my-secret-key")
    assert "my-secret-key" not in str(error.value) and "my-secret-key" not in repr(endpoint)


def test_a_held_port_is_for_our_server_alone() -> None:
    """It can be bound and listened on as vLLM does it, and thousands who ask for a free port do not get it."""
    with annotate.hold_port() as place, socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(place.getsockname())
        server.listen()
        for _ in range(5):
            socket.create_connection(place.getsockname()).close()
            server.accept()[0].close()
    with annotate.hold_port() as place:  # also while the server is still on its way
        for _ in range(30_000):
            with annotate.hold_port() as other:
                assert other.getsockname() != place.getsockname()


def listening(pids: list[int]) -> set[str]:
    """The addresses, in hexadecimal, on which the processes accept TCP connections (Linux)."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].split(":")[0])
    return found


def test_a_live_server_is_closed(server: Any) -> None:
    """Loopback only; the key in no command line, no file of the run, no environment that others can read."""
    port = server.url.split(":")[2].split("/")[0]
    leaders = {os.getpgid(pid) for pid in processes_naming(f"--port\0{port}")}
    group = [int(p.name) for p in Path("/proc").glob("[0-9]*") if in_groups(p, leaders)]
    assert len(group) > 1 and listening(group) == {"0100007F"}
    assert not processes_naming(server.key)
    for pid in group:
        assert stat.S_IMODE(Path(f"/proc/{pid}/environ").stat().st_mode) == 0o400
    logs = [Path(log) for log in re.findall(r"log: (\S+\.log)", server.about)]
    assert logs and all(server.key not in log.read_text(errors="replace") for log in logs)


def in_groups(process: Path, leaders: set[int]) -> bool:
    try:
        return os.getpgid(int(process.name)) in leaders
    except OSError:
        return False
