"""The numbers of the first version (commit 804f29d), kept in frozen.json: a rewrite may not move them.

One value is right where the first version's was not: alpha of (7, 6.999999) twenty times (it said -1.38).
`python tests/test_frozen.py` prints today's values. Change frozen.json only for a change that is meant.
"""

import hashlib
import json
import random
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

annotate, sft, rl = (import_module(name) for name in ("01_annotate", "02_train_judge", "03_rl"))
FROZEN = json.loads(Path(__file__).with_name("frozen.json").read_text())


def prompts(model: str) -> dict[str, Any]:
    """Prompts of judges and policies, and answers judges are trained on: length, ends and hash of the ids."""
    tokenizer, found = annotate.load_tokenizer(model), {}
    for number, (instruction, output, other) in enumerate(FROZEN["texts"]):
        shown = {"rubric": "3: says rain.\n6: is short."}
        for name, more in {"pointwise": {}, "pairwise": {"other": other}, "rubric": shown}.items():
            messages = annotate.judge_messages(instruction, output, **more)
            for kind in ("direct", "reasoning"):
                found[f"{number} {name} {kind}"] = sft.judge_prompt(tokenizer, messages, kind == "reasoning")
        found[f"{number} policy"] = annotate.policy_prompt(tokenizer, instruction)
    for label, thinking in ((0, None), (9, None), (7, "rain: 'rain falls.' +3=3.\nSo 7."), (2, "")):
        found[f"answer {label}"] = sft.judge_answer(tokenizer, label, thinking)
    hashes = {name: hashlib.sha256(str(ids).encode()).hexdigest()[:16] for name, ids in found.items()}
    return {name: [len(ids), *ids[:12], *ids[-12:], hashes[name]] for name, ids in found.items()}


def tiny_llama(vocabulary: int) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).float()


def logprobs(temperature: float) -> list[float]:
    """Of six answers of different lengths behind prompts with a common beginning, two of them the same."""
    rng, model = random.Random(1), tiny_llama(97)
    ids = [[rng.randrange(97) for _ in range(20)] for _ in range(7)]
    pairs = sorted((ids[6][:7] + ids[n][: n % 5], ids[n][5 : 7 + 2 * n]) for n in range(6))
    with torch.no_grad():
        return torch.cat([sft.answer_logprobs(model, p, temperature) for p in sft.pack(pairs, 60)]).tolist()


def loss_and_gradient(beta: float) -> list[float]:
    """Ratios below, inside and above the clip range, each sign of the advantage, several lengths."""
    shifts = torch.tensor([-0.5, 0, 0.5, -0.5, -0.1, 0.1, 0.2, 0.5, 0.3, -0.3, -0.2, 0.26, 0.4]).double()
    advantages_A = torch.tensor([1.3] * 3 + [-0.7] * 5 + [0.0] + [-2.0] * 4).double()
    weights_A = torch.tensor([1 / 12] * 3 + [1 / 20] * 5 + [1 / 4] + [1 / 16] * 4).double()
    old_A = -torch.linspace(0.1, 3, 13, dtype=torch.float64)
    new_A, reference_A = (old_A + shifts).requires_grad_(), old_A + shifts.flip(0) / 2
    (loss := rl.grpo_loss(new_A, old_A, advantages_A, weights_A, (0.2, 0.3), beta, reference_A)).backward()
    return [loss.item(), *new_A.grad.tolist()]


def rewards() -> dict[str, list[float]]:
    groups = ([1.0, 2.0, 6.0, 3.0], [5.0, 5.01], [4.0, 4.0], [1.0, None, 3.0], [None, None], [7.25])
    found = {f"advantages {group}": rl.group_advantages(group, 0.1) for group in groups}
    eq_1 = [rl.verifiable_reward(score, gold) for score in (None, 0, 4, 9) for gold in (0, 5, 9)]
    eq_3 = [rl.pairwise_verifiable_reward(said, gold) for said in (None, 1, 2) for gold in (1, 2)]
    return {**found, "eq. 1": eq_1, "eq. 3": eq_3}


def published() -> dict[str, float]:
    cases = json.loads((SHARED / "krippendorff_reference_values.json").read_text())["cases"]
    return {name: sft.krippendorff_alpha(zip(*case["data"])) for name, case in cases.items()}


def orders() -> dict[str, list[float]]:
    rates = {f"rates of {n}": [sft.learning_rate(step, n, 2e-3) for step in range(n)] for n in (1, 6, 70)}
    for seed in (0, 7):
        rates[f"seed {seed}"] = [i for s in range(6) for i in rl.prompts_of_step(range(10), s, 4, seed)]
    return rates


def fine_tuning(seed: int, interrupted: int | None = None) -> dict[str, Any]:
    """What each step saw and gave, and the norm of lora_B; `interrupted`: a step stopped and resumed."""
    rows, tokenizer = FROZEN["rows"], annotate.load_tokenizer(annotate.LAPTOP_MODEL)
    prompts = [sft.judge_prompt(tokenizer, sft.row_messages(row, None), True) for row in rows]
    seen, pack, rate = [], sft.pack, sft.learning_rate

    def spy(share: Any, budget: int) -> Any:
        seen.extend(sorted(prompts.index(prompt) for prompt, _ in share if prompt in prompts))
        return pack(share, budget)

    def stop(step: int, *rest: Any) -> float:
        return pytest.fail("stopped") if step == interrupted else rate(step, *rest)

    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        run, options = Path(scratch), {**FROZEN["options"], "model": scratch, "seed": seed}
        tiny_llama(49152).save_pretrained(run)
        tokenizer.save_pretrained(run)
        annotate.write_jsonl(run / "annotations" / "labels.jsonl", rows)
        annotate.write_json(run / "annotations" / "labels.json", {})
        patch.setattr(sft, "pack", spy)
        patch.setattr(torch.cuda, "is_available", lambda: False)  # these are numbers of a CPU, in float32
        if interrupted is not None:
            with pytest.raises(pytest.fail.Exception), pytest.MonkeyPatch.context() as once:
                once.setattr(sft, "learning_rate", stop)
                sft.fine_tune(options, run, run)
            del seen[-4:]
        sft.fine_tune(options, run, run)
        metrics = annotate.read_jsonl(run / "metrics.jsonl")
        weights = load_file(run / "epoch-2" / "adapter_model.safetensors")
    norm = sum(value.square().sum().item() for name, value in weights.items() if "lora_B" in name) ** 0.5
    found = {key: [step[key] for step in metrics] for key in ("loss", "grad_norm")}
    return {**found, "lora_B": norm, "examples": seen}


MEASURES = {
    "smollm2": lambda: prompts(annotate.LAPTOP_MODEL),
    "qwen3": lambda: prompts(str(SHARED / "tokenizers" / "qwen3")),
    "logprobs": lambda: {str(temperature): logprobs(temperature) for temperature in (1.0, 0.7)},
    "loss": lambda: {str(beta): loss_and_gradient(beta) for beta in (0.0, 0.1)},
    "rewards": rewards,
    "alpha": lambda: {name: sft.krippendorff_alpha(units) for name, units in FROZEN["ratings"].items()},
    "published alpha": published,
    "orders": orders,
    "sft 0": lambda: fine_tuning(0),
    "sft 3": lambda: fine_tuning(3),
    "sft resumed": lambda: fine_tuning(0, interrupted=3),
}


@pytest.mark.parametrize("name", MEASURES)
def test_frozen(name: str) -> None:
    if name in ("qwen3", "published alpha") and not SHARED.exists():
        pytest.skip("shared data not here")
    found, wanted = MEASURES[name](), FROZEN[name]
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if value is not None and name not in ("smollm2", "qwen3"):
            value = pytest.approx(value, rel=1e-5 if name == "logprobs" or "sft" in name else 1e-9)
        assert found[key] == value, key


if __name__ == "__main__":
    print(json.dumps({**FROZEN, **{name: measure() for name, measure in MEASURES.items()}}))
