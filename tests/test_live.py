"""Against a live vLLM server: what the sampler says is what the trainer computes, and no server stays."""

import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import ROOT, annotate, descendants, ended, living, processes_naming, rl, sft
from test_annotate import ASKED
from test_evaluate import evaluate
from transformers import AutoModelForCausalLM


def lora_model() -> Any:
    about = {
        "lora_rank": 16,
        "lora_modules": sft.modules_of("laptop"),
        "seed": 0,
        "lr": 1.0,
        "checkpointing": False,
    }
    return sft.load_training({**about, "model": annotate.LAPTOP_MODEL}, None)[0]


def test_sampler_and_trainer_agree_after_an_adapter_swap(server: Any, tokenizer: Any, tmp_path: Path) -> None:
    """To 1e-3 a token, both in float32; not at another temperature, and not with the adapter before."""
    model = lora_model()
    prompt, before = annotate.policy_prompt(tokenizer, ASKED), None

    def gap(samples: list[Any], temperature: float) -> float:
        sampled = [x for s in samples for x in s.logprobs_T]
        packs = sft.pack([(prompt, s.tokens_T) for s in samples], 512)
        with torch.no_grad():
            mine = torch.cat([sft.answer_logprobs(model, packed, temperature) for packed in packs])
        return (mine.cpu() - torch.tensor(sampled)).abs().max().item()

    for number in range(3):
        name = rl.publish(server, model, tmp_path, number)
        samples = server.sample(prompt, 4, name, temperature=0.7, max_tokens=24)
        assert gap(samples, 0.7) < 1e-3 and gap(samples, 1.0) > 1e-2
        assert before is None or gap(before, 0.7) > 0.05
        before = samples
        torch.manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter += 0.02 * torch.randn_like(parameter)
    with pytest.raises(openai.NotFoundError):  # the adapter before is not served any more
        server.sample(prompt, 1, "step-000001", max_tokens=1)
    server.unload_adapter("step-000002")


def token_logprobs(endpoint: Any, prompt: list[int], tokens_T: list[int]) -> list[float]:
    """The log-probability of each of `tokens_T` after `prompt`, at temperature 1, under the base model."""
    request = {"model": endpoint.model, "prompt": prompt + tokens_T, "max_tokens": 1, "prompt_logprobs": 0}
    found = endpoint.ask(prompt, request, lambda choices: choices[0]["prompt_logprobs"][len(prompt) :])
    return [place[str(token)]["logprob"] for place, token in zip(found, tokens_T)]  # {id: {"logprob": …}}


def test_requests_without_adapter_get_none_in_a_mixed_batch(
    server: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """vLLM 0.32 on a CPU gives them the one in its last slot: both slots are taken here."""
    model = lora_model()
    for name in ("first", "second"):
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.05)
        sft.save_adapter(model, tmp_path / name)
        server.load_adapter(name, tmp_path / name)
    asked = [annotate.policy_prompt(tokenizer, f"{ASKED} {n}") for n in range(8)]
    text = annotate.encode(tokenizer, "Rain falls on the quiet hills and on the sea.")
    with ThreadPoolExecutor(16) as pool:
        busy = [pool.submit(server.sample, asked[0], 4, x, max_tokens=64) for x in ("first", "second")]
        time.sleep(1)
        mixed = list(pool.map(lambda prompt: token_logprobs(server, prompt, text), asked))
        assert not any(one.done() for one in busy)
    alone = [token_logprobs(server, prompt, text) for prompt in asked]
    assert torch.tensor(mixed).sub(torch.tensor(alone)).abs().max() < 1e-3
    for name in ("first", "second"):
        server.unload_adapter(name)


def test_a_judge_reads_the_ten_labels(server: Any, tokenizer: Any) -> None:
    """Its expected score equals that of an independent forward pass, constrained to the labels by hand."""
    verdict = sft.ask_judge(sft.Judge(server, tokenizer, None, reasoning=False), ASKED, "Rain falls.")
    base = AutoModelForCausalLM.from_pretrained(annotate.LAPTOP_MODEL, dtype=torch.float32)
    prompt = sft.judge_prompt(tokenizer, annotate.judge_messages(ASKED, "Rain falls."), False)
    with torch.no_grad():
        p = base(torch.tensor([prompt])).logits[0, -1, sft.label_token_ids(tokenizer)].softmax(-1)
    assert verdict["probabilities"] == pytest.approx(p.tolist(), abs=1e-3)
    assert verdict["expected"] == pytest.approx((p * torch.arange(10)).sum().item(), abs=5e-3)
    assert verdict["label"] == p.argmax().item() and verdict["thinking_tokens"] == 0


def test_a_policy_writes_an_output(server: Any, tokenizer: Any) -> None:
    policy = {"temperature": 0.3, "max_tokens": 12}
    row = {"policy": "direct", "step": 8, "instruction": ASKED}
    found = evaluate.write_output(policy, tokenizer, (server, None), row)
    assert found.keys() == {*row, "output", "tokens", "finished"} and 0 < found["tokens"] <= 12


def test_what_makes_a_judgement_invalid(server: Any, tokenizer: Any) -> None:
    """Thinking that never closes, a prompt over the server's context; and what a chat model says."""
    thinker = sft.Judge(server, tokenizer, None, reasoning=True, max_thinking=8)
    verdict = sft.ask_judge(thinker, ASKED, "Rain falls.")
    assert (verdict["label"], verdict["expected"], verdict["cause"]) == (None, None, "thinking did not close")
    assert 0 < verdict["thinking_tokens"] <= 8
    direct = sft.Judge(server, tokenizer, None, reasoning=False)
    assert "refused (400)" in sft.ask_judge(direct, ASKED, "rain " * 600)["cause"]
    verdict = annotate.grade_by_chat(server, annotate.judge_messages(ASKED, "Rain."), "0123456789", 4, "none")
    assert (verdict["label"] is None) == (verdict["cause"] in ("cut off", "not a label", "no final answer"))


def test_a_rollout_holds_all_that_was_sampled(server: Any, tokenizer: Any) -> None:
    """Its stop token too, but not in the text; each has the reward of its own text."""

    def rewards(row: Any, samples_G: list[Any], pool: Any) -> Any:
        return [float(len(s.text)) for s in samples_G], [{} for _ in samples_G]

    rows = [{"id": f"{n}", "instruction": "Say only: yes"} for n in range(2)]
    task = rl.Task(rows, lambda row: annotate.policy_prompt(tokenizer, row["instruction"]), rewards)
    how = {
        "threads": 4,
        "group": 8,
        "temperature": 0.7,
        "max_tokens": 24,
        "std_floor": 0.1,
        "scale_std": True,
    }
    batch = rl.collect(server, server.model, task, [rows[:1], rows[1:]], how)
    assert [len(minibatch) for minibatch in batch] == [1, 1]
    groups = [group for minibatch in batch for group in minibatch]
    assert [len(group) for group in groups] == [8, 8]
    samples = [r.sample for group in groups for r in group]
    assert {s.finished for s in samples} == {False, True}
    for s, reward in zip(samples, [r.reward for group in groups for r in group]):
        assert reward == len(s.text) and len(s.tokens_T) == len(s.logprobs_T)
        assert (s.tokens_T[-1] == tokenizer.eos_token_id) == s.finished and tokenizer.eos_token not in s.text


def test_a_live_server_is_closed(server: Any) -> None:
    """Loopback only; the key on no command line, and in no environment that others can read."""
    (leader,) = processes_naming(f"--port\0{server.url.split(':')[2].split('/')[0]}")
    ours = [leader, *descendants(leader)]
    links = [link for pid in ours for link in Path(f"/proc/{pid}/fd").glob("*") if link.is_symlink()]
    sockets = {os.readlink(link) for link in links}
    tables = [Path(f"/proc/net/{table}").read_text().splitlines() for table in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    listening = {r[1].split(":")[0] for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in sockets}
    assert listening == {"0100007F"} and len(server.key) > 20
    assert not processes_naming(server.key) and server.key not in repr(server)
    assert all(stat.S_IMODE(Path(f"/proc/{pid}/environ").stat().st_mode) == 0o400 for pid in ours)
    assert b"_START_DATE=2025-08-05" in Path(f"/proc/{leader}/environ").read_bytes()  # R12, gpt-oss's
    with pytest.raises(openai.AuthenticationError):
        annotate.Endpoint(server.url, "wrong", server.model).sample([1, 2], max_tokens=1)


HOLDER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
from importlib import import_module
from pathlib import Path
annotate = import_module("01_annotate")
app = annotate.typer.Typer()
@app.command()
def main(folder: Path):
    with annotate.serve(annotate.LAPTOP_MODEL, folder, 512):
        print("up", flush=True)
annotate.start(app)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_starting_ends_with_its_script(tmp_path: Path, number: signal.Signals) -> None:
    """One that is up: in test_commands.py."""
    line = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("starting")
    time.sleep(6)
    servers = descendants(process.pid)
    assert servers
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode != 0 and output == "" and "Traceback" not in error
    assert ended(servers), "server processes left"


def test_a_server_that_cannot_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), annotate.serve(str(tmp_path / "no-model"), tmp_path, 64):
        pass
    message = capsys.readouterr().err
    assert "no-model" in message and str(next(tmp_path.glob("*.log"))) in message


def test_a_killed_server_leaves_no_engine(server: Any) -> None:
    """The last test here: nobody can ask this server any more."""
    (leader,) = processes_naming(f"--port\0{server.url.split(':')[2].split('/')[0]}")
    engines = descendants(leader)
    assert any(map(living, engines))
    os.kill(leader, signal.SIGKILL)
    assert ended(engines)
