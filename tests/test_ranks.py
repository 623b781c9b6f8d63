"""Several ranks, here as processes on the CPU under gloo: the same step as one rank takes alone."""

import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import Peft, random_llama, random_pairs, rollouts

annotate = import_module("01_annotate")
sft = import_module("02_train_judge")
rl = import_module("03_rl")

OPTIONS = {"temperature": 0.7, "clip_low": 0.2, "clip_high": 0.3, "beta": 0.0, "tokens_per_pass": 60}


class Spy(torch.optim.SGD):
    """Keeps the gradient that it is handed."""

    def step(self, closure: Any = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def one_update(folder: Path) -> None:
    """One optimiser step of eq. 2 on this rank's share of three groups; what it saw goes to a file."""
    model = random_llama()
    optimizer = Spy(model.parameters(), lr=0.1)
    torch.nn.utils.clip_grad_norm_ = lambda parameters, limit: torch.tensor(1.0)  # the sum itself is wanted
    rank, ranks = sft.world()
    stats = rl.update(Peft(model), optimizer, rollouts(seed=3)[rank::ranks], OPTIONS)
    torch.save([optimizer.seen, stats], folder / f"{ranks}-{rank}.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("alone")
    clip = torch.nn.utils.clip_grad_norm_
    sft.on_ranks(one_update, "0", folder)
    torch.nn.utils.clip_grad_norm_ = clip
    return torch.load(folder / "1-0.pt")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_the_same_step(alone: Any, ranks: int, tmp_path: Path) -> None:
    """Three groups of different weight over 2 ranks (2 and 1 groups) and over 4 (one has none, one a flat group)."""
    sft.on_ranks(one_update, ",".join(map(str, range(ranks))), tmp_path)
    gradients, stats = alone
    scale = max(g.abs().max().item() for g in gradients)
    assert scale > 1e-3
    for rank in range(ranks):
        got, same = torch.load(tmp_path / f"{ranks}-{rank}.pt")
        assert same == pytest.approx(stats), "every rank knows the statistics of the whole step"
        for mine, theirs in zip(got, gradients):
            assert torch.allclose(mine, theirs, atol=1e-5 * scale)


def fail_on_the_second(folder: Path) -> None:
    if sft.world()[0] == 1:
        annotate.fail("on purpose")
    sft.barrier()  # would wait for ever


def test_an_error_in_one_rank_ends_all(tmp_path: Path) -> None:
    began = time.perf_counter()
    with pytest.raises(SystemExit) as end:
        sft.on_ranks(fail_on_the_second, "0,1", tmp_path)
    assert end.value.code == 1 and time.perf_counter() - began < 60


def test_memory_shares() -> None:
    assert rl.memory_shares({"policy": "0,1", "judge": "2,3,4,5"}, "6,7") == {"policy": 0.9, "judge": 0.9}
    assert rl.memory_shares({"policy": "0", "judge": "0"}, "0") == {"policy": 0.225, "judge": 0.225}
    assert rl.memory_shares({"policy": "0,1"}, "1") == {"policy": 0.45}, "the tightest of its GPUs decides"


# --- the loop with a stand-in for the server: what each rank samples, publishes and trains on ----


class Sampler:
    """Answers from a fixed table, by prompt; some answers take longer than others. Ranks share `loaded`."""

    def __init__(self, loaded: Path) -> None:
        self.loaded = loaded
        self.loaded.mkdir(exist_ok=True)
        self.asked: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.count: dict[int, int] = {}

    def replica(self) -> Any:
        return self

    def load_adapter(self, name: str, path: Path) -> None:
        assert (path / "adapter_model.safetensors").exists()
        (self.loaded / name).touch(exist_ok=False)

    def unload_adapter(self, name: str) -> None:
        (self.loaded / name).unlink()

    def sample(self, prompt: list[int], model: str, **settings: Any) -> Any:
        assert (self.loaded / model).exists(), "sampled from an adapter that is not served any more"
        with self.lock:
            number = self.count[prompt[-1]] = self.count.get(prompt[-1], -1) + 1
        time.sleep(0.02 * (3 - number % 4))  # the first to be asked is the last to finish
        self.asked.append((model, prompt[-1]))
        tokens = [(7 * prompt[-1] + 3 * number + i) % 90 for i in range(1 + number % 3)]
        return [annotate.Sample(tokens, [-4.5] * len(tokens), f"{number}", True)]


def test_rewards_stay_with_their_rollouts(tmp_path: Path) -> None:
    """Whatever the order in which samples finish, a rollout has the reward of its own text."""
    task = rl.Task([], lambda row: [1, row["number"]], rl.one_by_one(lambda row, s: (float(s.text), {})), None)
    options = {"threads": 8, "group": 4, "temperature": 1.0, "max_tokens": 4, "std_floor": 0.1}
    server = Sampler(tmp_path / "loaded")
    (server.loaded / "a").touch()
    groups, _ = rl.collect(server, "a", task, [{"number": 5}, {"number": 6}], options)
    for group in groups:
        assert sorted(r.reward for r in group) == [0, 1, 2, 3]
        assert all(r.reward == float(r.sample.text) for r in group)
        assert [r.advantage for r in group] == pytest.approx(rl.group_advantages([r.reward for r in group], 0.1))


LOOP = {
    "model": annotate.LAPTOP_MODEL, "lora_rank": 8, "lora_modules": ["q_proj"], "seed": 0, "lr": 1e-3, "steps": 3,
    "prompts": 3, "group": 3, "minibatches": 2, "threads": 8, "temperature": 1.0, "max_tokens": 4, "tokens_per_pass": 100,
    "clip_low": 0.2, "clip_high": 0.3, "beta": 0.0, "std_floor": 0.1, "save_rollouts": 100, "show_every": 100,
    "checkpoint_every": 2, "save_every": 1, "overlap": False,
}  # fmt: skip


def loop(folder: Path, options: dict[str, Any]) -> None:
    rows = [{"id": str(n), "number": n, "instruction": "x"} for n in range(5)]
    task = rl.Task(rows, lambda row: [1, 2, row["number"]], rl.one_by_one(lambda row, s: (float(s.text) % 5, {})), None)
    rl.EXPLODED = 1e9  # the stand-in's log-probabilities are not the model's
    sampler = Sampler(folder / "loaded")
    rl.grpo(options, folder, sampler, task)
    annotate.write_json(folder / f"asked-{sft.world()[0]}.json", sampler.asked)


@pytest.mark.parametrize(("gpus", "overlap"), [("0", False), ("0", True), ("0,1", False), ("0,1", True)])
def test_the_loop(tmp_path: Path, gpus: str, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are used while they are served, one step stale with overlap; ranks split each minibatch."""
    import json

    monkeypatch.setattr(rl, "stop_for_inspection", lambda *a: None)  # the gap is far off, on purpose
    sft.on_ranks(patient_loop, gpus, tmp_path, {**LOOP, "overlap": overlap})
    metrics = annotate.read_jsonl(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert [m["stale"] for m in metrics] == [False, overlap, overlap]
    assert all(m["rollouts"] == 9 for m in metrics)
    rows = [{"id": str(n)} for n in range(5)]
    for m in metrics:  # in the order of the prompts, whatever rank they went to
        assert m["prompt_ids"] == [row["id"] for row in rl.prompts_of_step(rows, m["step"], 3, 0)]
    batches = [json.loads(path.read_text()) for path in tmp_path.glob("batches-*.json")]
    for step in range(3):  # a minibatch is the same prompts however many ranks share it
        ids = [row["id"] for row in rl.prompts_of_step(rows, step, 3, 0)]
        for number, wanted in enumerate((ids[:2], ids[2:])):
            assert sorted(i for mine in batches for i in mine[2 * step + number]) == sorted(wanted)
    asked = [pair for path in tmp_path.glob("asked-*.json") for pair in json.loads(path.read_text())]
    used = {step: {model for model, number in asked if model.endswith(f"{step:06d}")} for step in range(3)}
    assert [len(names) for names in used.values()] == ([1, 1, 0] if overlap else [1, 1, 1])
    records = annotate.read_jsonl(tmp_path / "rollouts.jsonl")
    assert len({r["id"] for r in records}) == len(records) == 27
    assert all(r["reward"] == float(r["completion"]) % 5 for r in records)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert not (tmp_path / "served").exists() and not list((tmp_path / "loaded").iterdir())


def patient_loop(folder: Path, options: dict[str, Any]) -> None:
    rl.stop_for_inspection = lambda *a: None  # in a rank of its own the test's patch is not there
    update, batches = rl.update, []

    def recorded(model: Any, optimizer: Any, groups: Any, options: Any) -> Any:
        batches.append([group[0].row["id"] for group in groups])
        return update(model, optimizer, groups, options)

    rl.update = recorded
    loop(folder, options)
    rl.update = update
    annotate.write_json(folder / f"batches-{sft.world()[0]}.json", batches)


def sft_steps(folder: Path) -> None:
    options = {
        "model": annotate.LAPTOP_MODEL, "lora_rank": 8, "lora_modules": ["q_proj"], "seed": 0, "lr": 1e-3,
        "batch": 5, "epochs": 1, "tokens_per_pass": 100, "save_every": 10,
    }  # fmt: skip
    sft.sft(options, folder, random_pairs(seed=5)[:10])


def test_fine_tuning_on_two_ranks(tmp_path: Path) -> None:
    """Same losses and gradients as on one rank (uneven shares: 2 and 3 of 5), the second after an update."""
    found = []
    for name, gpus in (("one", "0"), ("two", "0,1")):
        (tmp_path / name).mkdir()
        sft.on_ranks(sft_steps, gpus, tmp_path / name)
        metrics = annotate.read_jsonl(tmp_path / name / "metrics.jsonl")
        found.append([(m["loss"], m["grad_norm"]) for m in metrics])
        assert (tmp_path / name / "epoch-1" / "adapter_model.safetensors").exists()
    one, two = found
    assert len(one) == 2 and one[0] != one[1]
    for (loss, norm), (same_loss, same_norm) in zip(one, two):
        assert loss == pytest.approx(same_loss, rel=1e-5) and norm == pytest.approx(same_norm, rel=1e-3)
