"""`--preset gpu` from 01 to 05 on a CPU: tiny random models of two architectures, a stub gold, Tulu rows.

It shows that what only the large presets do runs to its end; with random weights no figure means anything.
Commands that differ in their defaults only are in test_commands.py.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, annotate, command, two_ranks
from stub import stub


def tiny(folder: Path, kind: str, tokenizer: Any) -> str:
    """A model of a few thousand weights with `tokenizer`, saved to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": len(tokenizer)}
    shape |= {"max_position_embeddings": 8192, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = (
        Qwen3ForCausalLM(Qwen3Config(**shape)) if kind == "qwen3" else LlamaForCausalLM(LlamaConfig(**shape))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def qwen3_tokenizer(other: Any) -> Any:
    """Qwen3's own tokenizer where it is there; else `other` with the tokens that its judges need."""
    from transformers import AutoTokenizer

    if (folder := SHARED / "tokenizers" / "qwen3").exists():
        return AutoTokenizer.from_pretrained(folder)
    ours = copy.deepcopy(other)  # which other tests have too
    ours.add_tokens(["<think>", "</think>"])
    return ours


def preference(number: int) -> dict[str, Any]:
    """A row as the Tulu 3 preference mixture has it: the user's turn stands before both answers."""
    user = {"role": "user", "content": f"Question {number}? Answer in one sentence."}
    chats = {
        name: [user, {"role": "assistant", "content": f"{name} answer number {number}."}]
        for name in ("chosen", "rejected")
    }
    source = "tulu-off-policy" if number < 12 else "tulu-on-policy"
    return {"id": str(number), "prompt": user["content"], "source": source, **chats}


@two_ranks
def test_the_gpu_preset_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = tiny(tmp_path / "judge", "qwen3", qwen3_tokenizer(annotate.load_tokenizer(annotate.LAPTOP_MODEL)))
    policy = tiny(tmp_path / "policy", "llama", annotate.load_tokenizer(annotate.LAPTOP_MODEL))
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    annotate.write_jsonl(data, [preference(number) for number in range(20)])
    monkeypatch.setenv("GOLD_API_KEY", "secret")
    small = f"--run {run} --lora-rank 8"
    with stub() as url:
        lines = [
            f"01_annotate.py --preset gpu --run {run} --data {data} --gold gold "
            f"--gold-url {url}/9999/well/v1 --policy-model {policy} --judge-train 6 --judge-validation 2 "
            "--judge-test 2 --policy-train 4 --policy-test 2 --efforts low --rubrics --pairs",
            f"02_train_judge.py {small} --model {judge} --no-reasoning --epochs 1 --batch 4 "
            "--max-thinking 32",
            f"03_rl.py policy {small} --model {policy} --judge direct --steps 1 --prompts 2 --group 2 "
            "--minibatches 1 --max-tokens 24 --train-gpus 0,1",
            f"04_evaluate.py gold --run {run}",
            f"05_attack_analysis.py battery --run {run} --judge gold --limit 1 --attack refusal",
            f"05_attack_analysis.py transfer --run {run}",
            f"05_attack_analysis.py report --run {run}",
        ]
        for line in lines:
            done = command(line)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    options = json.loads((run / "judges" / "direct-sft" / "config.json").read_text())["options"]
    assert (options["lr"], options["max_prompt"]) == (1e-4, 4096)
    assert "up_proj" in options["lora_modules"]
    (metrics,) = annotate.read_jsonl(run / "policies" / "direct" / "metrics.jsonl")
    assert metrics["rollouts"] == 4 and metrics["invalid"] == 0  # of both ranks
    (point, last) = json.loads((run / "evaluation" / "gold.json").read_text())["curves"]["direct"]
    assert (point["step"], last["step"], last["gold_unusable"], "truth" in last) == (0, 1, 0, False)
    assert (run / "report.html").stat().st_size > 1000
