"""tests/cost.py: its formulas by hand, against what a process really takes, and as a command."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT, annotate, rl, sft

sys.path.insert(0, str(ROOT / "tests"))
cost = import_module("cost")


def test_the_formulas_by_hand() -> None:
    """Qwen3-4B's published 4.0B weights; every term in bytes; a chunk bounds the vocabulary's."""
    layers, embeddings, cache = cost.counts("Qwen3-4B")
    assert layers + embeddings == pytest.approx(4.02e9, rel=0.01) and cache == 36 * 2 * 8 * 128 * 2
    parts = cost.memory("Qwen3-4B", 8192, 4000, 64)
    widths = (2560 + 4096) * 2 + (2560 + 1024) * 2 + (2560 + 9728) * 3
    assert parts == {
        "weights": 2 * (layers + embeddings),
        "adapter": 16 * 36 * 64 * widths,
        "checkpoints": 2 * 36 * 8192 * 2560,
        "layer": 2 * 8192 * widths,
        "answers": 4 * 4000 * 2560,
        "vocabulary": 12 * 2048 * 151936,
    }
    assert cost.memory("Qwen3-4B", 99, 100, 64)["vocabulary"] == 12 * 100 * 151936
    without = cost.memory("Qwen3-4B", 8192, 4000, 64, 4, checkpoints=False)
    assert without["checkpoints"] == 0 and without["layer"] == 36 * 2 * parts["layer"]
    one, group = (cost.training_flops("Qwen3-4B", 1000, 500, n) for n in (1, 2))
    assert 6 * layers * 1500 < one < 1.25 * 6 * layers * 1500
    assert group < 2 * one - 6 * layers * 1000  # the prompt once


def test_a_server_reads_its_weights_once_a_step_for_all() -> None:
    """More sequences at once write faster until the cache is full; two cards hold and read twice as much."""
    card = cost.Card(24e9, 1e12, 1e15, 1)
    few, many = (cost.Server(12e9, 1e9, 25_000, card, sequences=n).seconds(512, 0, 1000) for n in (8, 32))
    assert 3 < few / many < 4
    full = cost.Server(12e9, 1e9, 1_000_000, card, sequences=10_000).seconds(512, 0, 1000)
    room = (0.9 * 24e9 - 12e9 - cost.RESERVED) / 1_000_000 / 500
    assert full == pytest.approx(512 * 1000 / room * (12e9 + room * 500 * 1e6) / (1e12 / 3))
    assert cost.Server(12e9, 1e9, 1_000_000, card, 2, sequences=10_000).seconds(512, 0, 1000) < full / 2


def test_every_preset_has_its_shapes_and_its_hours() -> None:
    for preset, cards in {"gpu": ("gpu-24GB", "gpu-80GB"), "node": ("node",)}.items():
        found = [cost.stages(preset, cost.CARDS[card], card != "gpu-24GB") for card in cards]
        assert all(len(stages) == 7 and all(hours > 0 for _, hours in stages) for stages in found)
        for slow, fast in zip(found[0], found[-1]):
            assert slow[0] == fast[0] and fast[1] <= slow[1]
        *_, policy = cost.all_options(preset)
        assert (
            policy["steps"] == rl.POLICY_PRESETS[preset]["steps"] >= 1000
        )  # or the second finding can not show
    _, two, _, policy = cost.all_options("gpu")
    assert two["model"] == policy["model"] == annotate.SMALL_MODEL and two["lr"] == sft.LARGE["lr"]
    parts = cost.memory(
        two["model"].split("/")[-1], two["tokens_per_pass"], two["tokens_per_pass"], two["lora_rank"]
    )
    assert sum(parts.values()) < 0.5 * 24e9, "no room beside the server's 0.45 of the smallest card"


MEASURE = """
import json, sys
import cost
cost.SHAPES["small"] = shape = json.loads(sys.argv[1])
checkpoints = sys.argv[2] == "True"
o = {"model": "x/first", "lora_rank": 16, "seed": 0, "lr": 1e-4, "tokens_per_pass": 2048, "preset": "gpu"}
cost.SHAPES["first"] = (32, 32, 1, 2, 1, 16, 512, True)  # imports what there is to import
cost.measure(o, 1, 8, 8, grpo=False, checkpoints=checkpoints, passes=1)
o["model"] = "x/small"
print(cost.measure(o, shape[2], 512, 512, grpo=False, checkpoints=checkpoints, passes=1)[1])
print(sum(cost.memory("small", 2048, 1024, 16, 4, checkpoints).values()))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's float32")
@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize(
    "shape", [(256, 1024, 6, 4, 2, 64, 8192, True), (128, 256, 2, 4, 2, 32, 49152, False)]
)
def test_the_formula_of_memory_is_near_what_a_pack_takes(shape: tuple[int, ...], checkpoints: bool) -> None:
    """In float32 on a CPU: one shape where layers weigh most, one where the vocabulary does."""
    line = [sys.executable, "-c", MEASURE, json.dumps(shape), str(checkpoints)]
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else the allocator keeps what is freed
    done = subprocess.run(line, cwd=ROOT / "tests", capture_output=True, text=True, env=exact)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, formula = map(float, done.stdout.split())
    print(f"{shape}, checkpoints {checkpoints}: {peak / 1e6:.0f} MB, formula {formula / 1e6:.0f}")
    assert 0.6 < peak / formula < 1.6


@pytest.mark.parametrize("preset", ["gpu", "node", "laptop"])
def test_the_command_says_what_it_costs(preset: str) -> None:
    line = [sys.executable, "tests/cost.py", "--preset", preset, "--no-measure"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "cores" in done.stdout, done.stderr
    assert ("03 policy against reasoning" in done.stdout and "a goal" in done.stdout) == (preset != "laptop")
