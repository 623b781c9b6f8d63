"""tests/forks/beyond.md: our judges as the reward of TRL and of verl, and their adapters in stage 4."""

import inspect
import json
import re
import runpy
import shutil
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, annotate, rl, sft
from stub import stub
from test_docs import command_lines, parse
from test_frozen import tiny_llama
from test_train_judge import ASKED, Says

sys.path.insert(0, str(ROOT / "tests" / "forks"))
beyond, evaluate = import_module("judge_reward"), import_module("04_evaluate")
TEXT = (ROOT / "tests" / "forks" / "beyond.md").read_text()


@pytest.fixture
def asked(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A reasoning judge whose digit is sure and grows with the output; of "?" it thinks without an end."""
    texts: list[str] = []

    class Endpoint(Says):
        def sample(self, prompt: list[int], n: int, model: Any, **more: Any) -> Any:
            text = tokenizer.decode(prompt)
            texts.append(text)
            output = re.search(r"\[answer (\w{6})\]\n(.*)\n\[end \1\]", text, re.DOTALL)
            assert output and model == "judge"
            self.thinking = "hm" if output[2] == "?" else "well</think>"
            self.probabilities = [0.0] * 10
            self.probabilities[min(9, len(output[2]) % 10)] = 1.0
            return super().sample(prompt, n, model, **more)

        def create(self, extra_body: Any, **_: Any) -> Any:
            pairs = zip(extra_body["allowed_token_ids"], self.probabilities)
            top = {f"token_id:{i}": 0.0 for i, p in pairs if p}
            return SimpleNamespace(choices=[SimpleNamespace(logprobs=SimpleNamespace(top_logprobs=[top]))])

    judge = sft.Judge(Endpoint(tokenizer, "", []), tokenizer, "judge", reasoning=True)
    monkeypatch.setattr(beyond, "judge", lambda: judge)
    monkeypatch.setattr(beyond, "THREADS", 1)  # of a fake endpoint
    return texts


def test_rewards_are_expected_scores_and_invalid_is_none(asked: list[str]) -> None:
    """Texts and chats, as TRL hands them over with all its columns; the instruction is the last turn."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Rain.", " ? ")]
    columns = {"completion_ids": [[1], [2]], "trainer_state": None, "log_extra": print}
    assert beyond.judge_reward([chat, chat], answers, **columns) == [5, None]
    assert beyond.judge_reward(prompts=[ASKED], completions=["Rain falls"]) == [0]
    assert all(f"Instruction: {ASKED}\n" in text and "Be brief" not in text for text in asked)


def test_verl_calls_it_by_these_names(asked: list[str]) -> None:
    """verl 0.9, reward_manager/naive.py; reward_kwargs and the router's arguments may be added."""
    extra = {"instruction": ASKED, "num_turns": 2, "rollout_reward_scores": {}}
    call = {"data_source": "tulu", "solution_str": "Rain.", "ground_truth": "", "extra_info": extra}
    router = {"reward_router_address": "x", "reward_model_tokenizer": None}
    assert beyond.compute_score(**call) == {"score": 5.0, "valid": 1.0}
    assert beyond.compute_score(**call | router | {"solution_str": "?"}) == {"score": -1.0, "valid": 0.0}
    assert not inspect.iscoroutinefunction(beyond.compute_score)  # verl runs it in a thread then


def test_verls_advantages_are_ours() -> None:
    """Called as verl's compute_advantage calls an estimator: groups by uid, in any order; padded rollouts."""
    scores, uids = [5.0, 7.0, -1.0, 4.0, 9.0, 4.0], ["a", "b", "a", "b", "a", "b"]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]] * 2)
    rewards = torch.zeros(6, 3)
    rewards[torch.arange(6), mask.sum(1) - 1] = torch.tensor(scores)
    call = {"token_level_rewards": rewards, "response_mask": mask, "config": None, "index": uids}
    advantages, returns = beyond.advantages_as_ours(**call)
    a, b = rl.group_advantages([5.0, None, 9.0], 0.1), rl.group_advantages([7.0, 4.0, 4.0], 0.1)
    expected = torch.tensor([a[0], b[0], a[1], b[1], a[2], b[2]])
    assert a[1] == 0 and torch.allclose(advantages, expected[:, None] * mask) and returns is advantages


def test_verl_gets_its_estimator_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl imports the file as an external module, then again by its path for the reward function."""
    registry: dict[str, Any] = {}
    core = SimpleNamespace(ADV_ESTIMATOR_REGISTRY=registry, register_adv_est=lambda name: partial(add, name))

    def add(name: str, estimator: Any) -> None:
        assert registry.setdefault(name, estimator) is estimator, "verl refuses a second one"

    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, core)
    for _ in range(2):
        runpy.run_path(str(ROOT / "tests" / "forks" / "judge_reward.py"))
    assert list(registry) == ["as_ours"] and "algorithm.adv_estimator=as_ours" in TEXT


@pytest.mark.parametrize("line", command_lines(TEXT))
def test_its_commands_are_understood(line: str) -> None:
    parse(line)


def test_the_judge_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from its folder, asked at the URL under the name `judge`; a pairwise one is refused."""
    about = {"model": annotate.LAPTOP_MODEL, "reasoning": True, "lora_rank": 8, "lora_modules": ["q_proj"]}
    about |= {"max_thinking": 7, "max_prompt": 99, "temperature": 0.7, "adapter": "epoch-1"}
    folder = tmp_path / "judges" / "reasoning-sft"
    annotate.write_json(folder / "judge.json", about)
    config = {"base_model_name_or_path": annotate.LAPTOP_MODEL, "r": 8}
    annotate.write_json(folder / "epoch-1" / "adapter_config.json", config)
    annotate.write_text(folder / "epoch-1" / "adapter_model.safetensors", "")
    monkeypatch.setenv("JUDGE_RUN", str(tmp_path))
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    with stub() as url:
        monkeypatch.setenv("JUDGE_URL", f"{url}/0/ok/v1")
        judge = beyond.judge.__wrapped__()
        assert (judge.adapter, judge.max_thinking, judge.max_prompt, judge.reasoning) == (
            "judge",
            7,
            99,
            True,
        )
        annotate.write_json(folder / "judge.json", {**about, "pairwise": True})
        with pytest.raises(SystemExit):
            beyond.judge.__wrapped__()


@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed (tests/bench_peers.py says how)")
def test_two_steps_of_trl(tokenizer: Any, asked: list[str], tmp_path: Path) -> None:
    """A tiny policy is trained on our judge's scores; then stage 4 finds its adapter as beyond.md says."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    model = str(tmp_path / "model")
    tiny_llama(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    how = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
    how |= {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.3, "beta": 0.0, "temperature": 0.7}
    how |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1}
    config = GRPOConfig(str(tmp_path / "out"), report_to="none", save_steps=2, learning_rate=1e-3, **how)
    rows = [{"prompt": [{"role": "user", "content": ASKED}]}] * 4
    modules = ["q_proj", "v_proj"]
    trainer = GRPOTrainer(
        model, reward_funcs=beyond.judge_reward, args=config, train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=8, target_modules=modules), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 2 and len(asked) == 8 and all(0 <= entry["reward"] <= 9 for entry in logged)

    folder = tmp_path / "run" / "policies" / "trl"
    shutil.copytree(tmp_path / "out" / "checkpoint-2", folder / "checkpoints" / "step-000002")
    needs = json.loads(re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)[1])  # type: ignore[index]
    annotate.write_json(
        folder / "policy.json", {**needs, "model": model, "lora_rank": 8, "lora_modules": modules}
    )
    assert list(evaluate.trained_policies(tmp_path / "run")["trl"]["checkpoints"]) == [2]


def test_stage_4_takes_any_adapter_by_the_recipe(tmp_path: Path) -> None:
    """What beyond.md says of policy.json is enough; another base or rank is refused by name."""
    needs = json.loads(re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)[1])  # type: ignore[index]
    folder = tmp_path / "policies" / "verl"
    annotate.write_json(folder / "policy.json", needs)
    step = folder / "checkpoints" / "step-000200"
    annotate.write_text(step / "adapter_model.safetensors", "")
    config = {"base_model_name_or_path": needs["model"], "r": needs["lora_rank"]}
    annotate.write_json(step / "adapter_config.json", config)
    found = evaluate.trained_policies(tmp_path)["verl"]
    assert found["checkpoints"] == {200: step} and found["judge"] == "reasoning-rl"
    annotate.write_json(step / "adapter_config.json", {**config, "base_model_name_or_path": "/scratch/m"})
    with pytest.raises(SystemExit):
        evaluate.trained_policies(tmp_path)
