"""Against a live vLLM server: what the sampler says is what the trainer computes, and no server stays."""

import math
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, processes_naming

annotate = import_module("01_annotate")
sft = import_module("02_train_judge")
rl = import_module("03_rl")

INSTRUCTION = "Write a sentence about the rain. Use the word soft. Do not say I."


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path]]:
    """A LoRA model, and the adapters saved after no, one and two random moves (the model holds the last)."""
    model = sft.load_model(annotate.LAPTOP_MODEL, None, 16, sft.ATTENTION)
    paths = []
    for number in range(3):
        paths.append(tmp_path_factory.mktemp(f"adapter-{number}"))
        model.save_pretrained(paths[-1])
        if number < 2:
            torch.manual_seed(number)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter += 0.02 * torch.randn_like(parameter)
    return model, paths


def trainer_logprobs(model: Any, prompt: list[int], samples: list[Any], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([sft.answer_logprobs(model, p, temperature) for p in sft.pack([(prompt, s.tokens_T) for s in samples], 512)])


def test_sampler_and_trainer_agree_after_an_adapter_swap(server: Any, tokenizer: Any, adapters: Any) -> None:
    """At temperature 0.7, to 1e-3 per token, in float32; and not with the adapter before."""
    model, paths = adapters
    prompt = annotate.policy_prompt(tokenizer, INSTRUCTION)
    gaps = {}
    for number, path in enumerate(paths):
        server.load_adapter(f"swap-{number}", path)
        samples = server.sample(prompt, n=4, model=f"swap-{number}", temperature=0.7, max_tokens=24)
        sampled = torch.tensor([x for s in samples for x in s.logprobs_T])
        gaps[number] = (trainer_logprobs(model, prompt, samples, 0.7) - sampled).abs()
        server.unload_adapter(f"swap-{number}")
    assert gaps[2].max() < 1e-3
    assert gaps[0].max() > 0.05 and gaps[1].max() > 0.05, "an older adapter must show"


def test_temperature_is_part_of_the_logprobs(server: Any, tokenizer: Any) -> None:
    prompt = annotate.policy_prompt(tokenizer, INSTRUCTION)
    (sample,) = server.sample(prompt, temperature=0.7, max_tokens=16)
    model = sft.load_model(annotate.LAPTOP_MODEL, None, 8, ["q_proj"])
    sampled = torch.tensor(sample.logprobs_T)
    assert (trainer_logprobs(model, prompt, [sample], 0.7) - sampled).abs().max() < 1e-3
    assert (trainer_logprobs(model, prompt, [sample], 1.0) - sampled).abs().max() > 1e-2


def test_fluency_is_the_base_models_logprob(server: Any, tokenizer: Any) -> None:
    """The mean log-probability of the output's tokens, at temperature 1, by an independent forward pass."""
    from transformers import AutoModelForCausalLM

    evaluate = import_module("04_evaluate")
    row = {"instruction": INSTRUCTION, "output": "The soft rain fell.", "finished": True}
    found = evaluate.measure_fluency(server, tokenizer, row)["fluency"]
    prompt = annotate.policy_prompt(tokenizer, INSTRUCTION)
    ids = torch.tensor([prompt + tokenizer.encode("The soft rain fell.<|im_end|>")])
    with torch.no_grad():
        logprobs = AutoModelForCausalLM.from_pretrained(annotate.LAPTOP_MODEL, dtype=torch.float32)(ids).logits[0, :-1].log_softmax(-1)
    behind = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
    assert found == pytest.approx(behind.mean().item(), abs=1e-3)
    assert evaluate.measure_fluency(server, tokenizer, {**row, "output": "Rain the fell soft."})["fluency"] < found
    assert evaluate.measure_fluency(server, tokenizer, {**row, "output": "", "finished": False})["fluency"] is None


def test_the_stop_token_is_part_of_the_rollout(server: Any, tokenizer: Any) -> None:
    prompt = annotate.policy_prompt(tokenizer, "Say only: yes")
    sample = next(s for s in server.sample(prompt, n=8, temperature=0.7, max_tokens=64) if s.finished)
    assert sample.tokens_T[-1] == tokenizer.eos_token_id and len(sample.logprobs_T) == len(sample.tokens_T)
    assert tokenizer.eos_token not in sample.text
    cut = server.sample(prompt, temperature=0.7, max_tokens=1, extra={"ignore_eos": True})[0]
    assert not cut.finished and len(cut.tokens_T) == 1


def test_direct_judge_reads_the_ten_labels(server: Any, tokenizer: Any) -> None:
    """The expected score equals that of an independent forward pass, constrained to the labels by hand."""
    from transformers import AutoModelForCausalLM

    verdict = annotate.ask_judge(annotate.Judge(server, tokenizer, None, reasoning=False), INSTRUCTION, "Rain falls.")
    model = AutoModelForCausalLM.from_pretrained(annotate.LAPTOP_MODEL, dtype=torch.float32)
    prompt = annotate.judge_prompt(tokenizer, annotate.judge_messages(INSTRUCTION, "Rain falls."), reasoning=False)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1, annotate.label_token_ids(tokenizer)]
    p = logits.softmax(-1)
    assert verdict.probabilities == pytest.approx(p.tolist(), abs=1e-3)
    assert verdict.expected == pytest.approx((p * torch.arange(10)).sum().item(), abs=5e-3)
    assert verdict.label == p.argmax().item() and verdict.thinking_tokens == 0


def test_thinking_that_never_closes_is_unusable(server: Any, tokenizer: Any) -> None:
    judge = annotate.Judge(server, tokenizer, None, reasoning=True, max_thinking=8)
    verdict = annotate.ask_judge(judge, INSTRUCTION, "Rain falls.")
    assert verdict.label is None and verdict.expected is None and 0 < verdict.thinking_tokens <= 8


def test_gold_by_chat_counts_what_it_cannot_use(server: Any) -> None:
    """A live chat model asked for a gold label: a digit, or no label and the cause."""
    got = annotate.gold_by_chat(server, INSTRUCTION, "Rain falls. It is wet.", max_tokens=4, effort="none")
    assert (got["label"] is None) == (got["cause"] is not None)
    assert got["cause"] in (None, "cut off", "not a digit", "no final answer")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("7", "because", True)], (7, "because", None)),
        ([("<think>\nwell\n</think>\n\n7", "", True)], (7, "well", None)),
        ([("", "so long", False), ("4", "so", True)], (4, "so", None)),
        ([("", "so long", False)] * 2, (None, "so long", "cut off")),
        ([("", "done", True)] * 2, (None, "done", "no final answer")),
        ([("Score: 7", "", True)] * 2, (None, "", "not a digit")),
        ([("77", "", True)] * 2, (None, "", "not a digit")),
    ],
)
def test_parsing_of_gold_answers(answers: list[Any], expected: tuple[Any, ...]) -> None:
    """Answers in the shapes a reasoning parser leaves, asked for again once with twice the tokens."""

    class Recorded:
        def __init__(self) -> None:
            self.limits: list[int] = []

        def chat(self, messages: Any, **settings: Any) -> Any:
            self.limits.append(settings["max_tokens"])
            return answers[len(self.limits) - 1]

    endpoint = Recorded()
    got = annotate.gold_by_chat(endpoint, INSTRUCTION, "x", max_tokens=100, effort="high")
    assert (got["label"], got["reasoning"], got["cause"]) == expected
    assert endpoint.limits == [100, 200][: len(answers)]


def test_collect_rewards_every_rollout(server: Any, tokenizer: Any) -> None:
    rows = [{"id": str(i), "instruction": INSTRUCTION} for i in range(2)]
    task = rl.Task(rows, lambda row: annotate.policy_prompt(tokenizer, row["instruction"]), rl.one_by_one(lambda row, s: (float(len(s.text)), {})), None)
    options = {"threads": 4, "group": 3, "temperature": 0.7, "max_tokens": 8, "std_floor": 0.1}
    groups, seconds = rl.collect(server, server.model, task, rows, options)
    assert [len(group) for group in groups] == [3, 3] and seconds["sample_seconds"] > 0
    assert all(r.reward == len(r.sample.text) and len(r.sample.tokens_T) == len(r.sample.logprobs_T) for group in groups for r in group)


# --- no server outlives its script ---------------------------------------------------------------

HOLDER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
from importlib import import_module
from pathlib import Path
annotate = import_module("01_annotate")
with annotate.serve(annotate.LAPTOP_MODEL, Path(sys.argv[1]), max_len=MAXLEN):
    print("up", flush=True)
    if sys.argv[2] == "error":
        raise RuntimeError("on purpose")
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C", "error", "kill -9 while starting"])
def test_no_server_outlives_its_script(tmp_path: Path, how: str) -> None:
    mark = str(400 + len(how))  # an odd --max-model-len tells this server from others
    program = HOLDER.replace("MAXLEN", mark)
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), how], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    if how.endswith("starting"):
        process.stdout.readline()
        time.sleep(8)
    else:
        while process.stdout.readline() != "up\n":
            assert process.poll() is None
    servers = processes_naming(f"--max-model-len\0{mark}")
    groups = {os.getpgid(pid) for pid in servers}
    assert len(groups) == 1
    if how == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    elif how.startswith("kill"):
        process.kill()
    process.wait(timeout=60)
    end = time.monotonic() + 20
    while time.monotonic() < end and any(alive(group) for group in groups):
        time.sleep(0.2)
    assert not any(alive(group) for group in groups), "server processes left"


def alive(group: int) -> bool:
    """Whether a process of the group is left (a zombie is not)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False


def test_a_server_that_cannot_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), annotate.serve(str(tmp_path / "no-model"), tmp_path, max_len=64):
        pass
    message = capsys.readouterr().err
    assert "ended while starting" in message and "no-model" in message


def test_the_key_is_on_no_command_line(server: Any) -> None:
    assert len(server.key) > 20 and not processes_naming(server.key) and server.key not in repr(server)
    with pytest.raises(annotate.ServerError, match="401"):
        annotate.Endpoint(server.url, "wrong", server.model).sample([1, 2], max_tokens=1)


def test_reward_noise_floor_is_in_points() -> None:
    """The floor is a tenth of a point: two scores 0.02 apart are worth at most a tenth of an advantage each."""
    assert max(rl.group_advantages([6.00, 6.02], 0.1)) == pytest.approx(0.1)
    assert math.isclose(max(rl.group_advantages([4.0, 6.0], 0.1)), 1.0)
