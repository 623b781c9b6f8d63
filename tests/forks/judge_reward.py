"""A judge of this project as the reward of another trainer: verl on many nodes, or TRL. beyond.md says how.

In the environment: JUDGE_RUN (a run's folder), JUDGE (reasoning, direct, another folder of RUN/judges),
JUDGE_URL (…/v1, where a vLLM server serves its adapter under the name `judge`), JUDGE_API_KEY.
"""

import functools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
annotate, sft, rl = (import_module(name) for name in ("01_annotate", "02_train_judge", "03_rl"))

THREADS = 64
INVALID = -1.0  # below every score: verl has no word for "no reward"


@functools.cache
def judge() -> Any:
    """The judge that the environment names."""
    run = Path(os.environ["JUDGE_RUN"])
    folder, record = sft.find_judge(run, os.environ.get("JUDGE", "reasoning"))
    if record.get("pairwise"):
        annotate.fail(f"{folder}: a pairwise judge needs the whole group (03_rl.py has eq. 4).")
    endpoint = annotate.open_endpoint(os.environ["JUDGE_URL"], record["model"], "JUDGE_API_KEY")
    return sft.served_judge(endpoint, annotate.load_tokenizer(record["model"]), "judge", record, run)


def score(instruction: str, output: str) -> float | None:
    """The judge's expected score of `output`, 0-9; None where the judgement is invalid: as in stage 3."""
    return sft.ask_judge(judge(), instruction, output.strip())["expected"]


# --- TRL: GRPOTrainer(reward_funcs=judge_reward, …) -------------------------------------------------


def judge_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """A reward for each completion. TRL leaves None out of the group's mean and gives it advantage 0."""

    def last(turns: Any) -> str:
        return turns if isinstance(turns, str) else turns[-1]["content"]

    judge()  # once, before there are threads
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(score, map(last, prompts), map(last, completions)))


# --- verl: reward.custom_reward_function, and an advantage estimator for invalid judgements ---------


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **more: Any
) -> dict[str, float]:
    """verl's reward of one rollout; the instruction stands in the data set's `extra_info`."""
    expected = score(extra_info["instruction"], solution_str)
    return {"score": INVALID if expected is None else expected, "valid": float(expected is not None)}


def advantages_as_ours(
    token_level_rewards: Any, response_mask: Any, index: Sequence[Any], **more: Any
) -> tuple[Any, Any]:
    """(advantages, returns) [N, T]: `group_advantages` of stage 3, std floor 0.1; 0 for invalid judgements.

    verl's own estimator would take the INVALID score for the worst output and train on it.
    """
    scores_N = token_level_rewards.sum(-1).tolist()
    rewards_N = [None if score <= INVALID else score for score in scores_N]
    advantages_N = token_level_rewards.new_zeros(len(scores_N))
    for group in set(index):
        members = [n for n, uid in enumerate(index) if uid == group]
        advantages = rl.group_advantages([rewards_N[n] for n in members], 0.1)
        advantages_N[members] = advantages_N.new_tensor(advantages)
    advantages_NT = advantages_N[:, None] * response_mask
    return advantages_NT, advantages_NT


if "verl" in sys.modules:
    core = import_module("verl.trainer.ppo.core_algos")
    if "as_ours" not in core.ADV_ESTIMATOR_REGISTRY:  # verl loads this file a second time, by its path
        core.register_adv_est("as_ours")(advantages_as_ours)
