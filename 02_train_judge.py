"""Stage 2: distil the gold judge into a small LoRA judge, with or without reasoning.

    --no-reasoning   instruction + output -> digit                                   (SFT, LoRA)
    --reasoning      instruction + output -> the gold judge's reasoning, then digit  (SFT, LoRA)

What goes in:   RUN/annotations/labels.jsonl
What comes out: RUN/judges/direct-sft/ or reasoning-sft/ (variants: reasoning-low-rubrics-sft/, …)
                epoch-1/, epoch-2/ …   a PEFT adapter after each epoch
                validation-1.jsonl …   its judgements of the validation outputs
                metrics.jsonl          loss and learning rate of each optimiser step
                judge.json             the epoch chosen, and its agreement with the gold judge

Simpler than the paper, and why:
 1. LoRA instead of full fine-tuning, at ten times the learning rate and more: an adapter is a small file that
    a running vLLM server loads, so one server plays every judge and the policy.
 2. No padding and no data loader: the examples of a batch are packed behind their common prefix (the judge's
    rules), which is computed once. `pack` is the one idea of this file.

    python 02_train_judge.py --run runs/demo --no-reasoning
    python 02_train_judge.py --run runs/demo --reasoning
"""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import accumulate, pairwise
from os.path import commonprefix
from pathlib import Path
from pickle import UnpicklingError
from statistics import fmean
from typing import Annotated, Any, TypedDict

import openai
import torch
import torch.distributed as dist
import typer
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface
from typer import Option

annotate = import_module("01_annotate")
encode, fail = annotate.encode, annotate.fail
Row, Options = annotate.Row, annotate.Options

# --- What a judge is asked and how it answers -----------------------------------------------------
# [thinking], `</think>`, an empty line, one digit. A judge without reasoning has an empty thinking, so both
# kinds give their digit in the same place.

THINK_OPEN, THINK_CLOSE, AFTER_THINKING = "<think>\n", "</think>", "\n\n"


def label_token_ids(tokenizer: Any, labels: str = annotate.LABELS) -> list[int]:
    """The token ids of `labels`; fails for a tokenizer that splits one of them."""
    ids = [encode(tokenizer, label) for label in labels]
    if any(len(i) != 1 for i in ids):
        fail(f"tokenizer {tokenizer.name_or_path}: a label of {labels} is not a single token: {ids}")
    return [i[0] for i in ids]


def thinking_end(tokenizer: Any) -> list[int]:  # in pieces, because a tokenizer may merge across their border
    return encode(tokenizer, THINK_CLOSE) + encode(tokenizer, AFTER_THINKING)


def judge_prompt(tokenizer: Any, messages: Any, reasoning: bool) -> list[int]:
    """Token ids after which a judge thinks (`reasoning`), or at once gives its digit."""
    ids = annotate.chat_ids(tokenizer, messages)
    opening = "" if tokenizer.decode(ids[-6:]).endswith(THINK_OPEN) else THINK_OPEN  # some templates end so
    if reasoning:
        return ids + encode(tokenizer, opening)
    # Empty thinking, with the line end that `judge_answer` puts after any thinking.
    return ids + encode(tokenizer, opening + "\n") + thinking_end(tokenizer)


def judge_answer(tokenizer: Any, label: int, thinking: str | None) -> list[int]:
    """The token ids that answer `judge_prompt`: [thinking, its end,] the digit, end of turn."""
    ids = [*label_token_ids(tokenizer, str(label)), tokenizer.eos_token_id]
    if thinking is None:
        return ids
    escaped = annotate.escape_special_tokens(thinking, tokenizer)
    return encode(tokenizer, escaped + "\n") + thinking_end(tokenizer) + ids


@dataclass
class Judge:
    """A judge behind an endpoint; `adapter` is the served LoRA name, None the base model."""

    endpoint: Any
    tokenizer: Any
    adapter: str | None
    reasoning: bool
    max_thinking: int = 4096  # tokens (paper: 4096)
    max_prompt: int = 4096  # tokens (paper: 4096)
    temperature: float = 0.7  # of the thinking, with top-k 20 and top-p 0.95 (paper: the same)
    rubrics: dict[str, str] | None = None  # instruction -> rubric, for a judge trained to see them
    pairwise: bool = False


def read_rubrics(run: Path) -> dict[str, str]:
    """instruction -> gold's rubric, "" where it gave none."""
    path = run / "annotations" / "rubrics.jsonl"
    annotate.require(path.with_suffix(".json"), f"01_annotate.py --run {run} --rubrics")
    return {row["instruction"]: row["rubric"] for row in annotate.read_jsonl(path)}


def row_messages(row: Row, rubrics: dict[str, str] | None) -> Any:
    """What a judge is asked about the output (or the pair of them) of `row`."""
    instruction = row["instruction"]
    if rubrics is not None and instruction not in rubrics:
        fail(f"this judge was trained with rubrics, and 01 made none for {instruction[:60]!r}.")
    rubric = (rubrics or {}).get(instruction, "")
    return annotate.judge_messages(instruction, row["output"], row.get("other"), rubric)


def expected_score(probabilities: Sequence[float], labels: str) -> float:
    """The sum of x * p(x) over the `labels` x, which is the policy's reward (paper, section 2.3)."""
    return sum(int(label) * p for label, p in zip(labels, probabilities))


def ask_judge(
    judge: Judge, instruction: str, output: str, other: str | None = None, messages: Any = None
) -> annotate.Verdict:
    """Let `judge` grade one output for `instruction`, or let a pairwise judge say which of two is better.

    [reasoning: sample until `</think>`], then one token constrained to the labels. Their log-probabilities
    give the label (the most probable) and the expected score. Of a pairwise judge P(the first is better) =
    2 - expected. A prompt that is too long, thinking that does not close, or a request that fails make the
    judgement invalid: no label, no score, and a `cause`. `messages` stand in place of the usual prompt.
    """
    verdict = {"label": None, "expected": None, "probabilities": None, "cause": None}
    verdict |= {"thinking": "", "thinking_tokens": 0}
    row = {"instruction": instruction, "output": output, "other": other}
    prompt = judge_prompt(judge.tokenizer, messages or row_messages(row, judge.rubrics), judge.reasoning)
    if len(prompt) > judge.max_prompt:
        return verdict | {"cause": "prompt too long"}
    try:
        if judge.reasoning:
            (thought,) = judge.endpoint.sample(
                prompt, 1, judge.adapter, temperature=judge.temperature, top_p=0.95, top_k=20,
                max_tokens=judge.max_thinking, stop=[THINK_CLOSE], include_stop_str_in_output=True,
            )  # fmt: skip
            verdict["thinking"] = thought.text.removesuffix(THINK_CLOSE).strip()
            verdict["thinking_tokens"] = len(thought.tokens_T)
            if not thought.text.endswith(THINK_CLOSE):
                return verdict | {"cause": "thinking did not close"}
            prompt = prompt + thought.tokens_T + encode(judge.tokenizer, AFTER_THINKING)
        labels = annotate.PAIRWISE_LABELS if judge.pairwise else annotate.LABELS
        probabilities = label_probabilities(judge, prompt, labels)
    except annotate.NoAnswer as error:
        return verdict | {"cause": str(error)}
    best = max(range(len(labels)), key=lambda place: probabilities[place])
    verdict["label"], verdict["expected"] = int(labels[best]), expected_score(probabilities, labels)
    verdict["probabilities"] = probabilities
    return verdict


def label_probabilities(judge: Judge, prompt: list[int], labels: str) -> list[float]:
    """The judge's probability of each of `labels` as its next token, normalised over them."""
    ids = label_token_ids(judge.tokenizer, labels)
    request = {"model": judge.adapter or judge.endpoint.model, "prompt": prompt, "max_tokens": 1}
    request |= {"temperature": 1.0, "logprobs": len(ids), "allowed_token_ids": ids}
    request["return_tokens_as_token_ids"] = True
    found = judge.endpoint.ask(prompt, request, lambda choices: choices[0]["logprobs"]["top_logprobs"][0])
    weights = [math.exp(found.get(f"token_id:{i}", -math.inf)) for i in ids]
    if abs(sum(weights) - 1) > 1e-3:
        fail(f"{judge.endpoint.url}: not constrained to the labels: their probability is {sum(weights):.4f}")
    return [weight / sum(weights) for weight in weights]


# --- Packing: several examples in one forward pass, their common prefix only once -----------------

Example = tuple[list[int], list[int]]  # token ids of a prompt and of its answer


@dataclass
class Pack:
    """One forward pass over a shared prefix and the branches behind it; S tokens, A answer tokens.

    A token sees the prefix and its own branch up to itself; its position counts as if the branch stood alone
    behind the prefix. The hidden state at `sources_A[i]` predicts `targets_A[i]`; `targets_A` is the answers
    of the packed examples joined, in the order of `members`.
    """

    members: Sequence[int]  # indices of the packed examples
    ids_S: list[int]
    positions_S: list[int]
    starts: list[int]  # where each branch begins
    sources_A: list[int]
    targets_A: list[int]


def pack(examples: Sequence[Example], budget: int) -> Iterator[Pack]:
    """Pack `examples`, in order, into forward passes of at most `budget` tokens (one alone may exceed it).

    An example joins the latest pack if together they cost no more tokens than apart. Say that pack has a
    prefix of 25 tokens and two branches of 2, and the next example alone has 27: apart 25 + 2 x 2 + 27 = 56.
        It shares all 25:  25 + 3 x 2 = 31 tokens together; it joins.
        It shares only 5:  each branch grows to 25 - 5 + 2 = 22; 5 + 3 x 22 = 71 together; a new pack begins.
    """
    current: Pack | None = None
    for index in range(len(examples)):
        alone = build_pack(examples, [index])
        if current is None:
            current = alone
            continue
        joined = build_pack(examples, [*current.members, index])
        if len(joined.ids_S) <= min(budget, len(current.ids_S) + len(alone.ids_S)):
            current = joined
        else:
            yield current
            current = alone
    if current:
        yield current


def build_pack(examples: Sequence[Example], members: Sequence[int]) -> Pack:
    """The pack of the `examples` with the indices `members`; the prefix is what their prompts share:

    ids_S        prefix | rest of prompt, answer | rest of prompt, answer | …
    positions_S  0 … p-1 | p, p+1 …              | p, p+1 …               | …
    starts               ^                       ^                        ^
    """
    prefix = len(commonprefix([examples[index][0] for index in members]))  # noqa: RUF071 (token ids)
    result = Pack(members, examples[members[0]][0][:prefix], list(range(prefix)), [], [], [])
    for index in members:
        prompt, answer = examples[index]
        start = len(result.ids_S)
        result.starts.append(start)
        branch = [*prompt[prefix:], *answer[:-1]]  # nothing follows the last token, so it is not fed
        result.ids_S += branch
        result.positions_S += range(prefix, prefix + len(branch))
        answer_at = start + len(prompt) - prefix
        # The answer's first token is predicted by its prompt's last: in the branch, or else in the prefix.
        before_answer = answer_at - 1 if len(prompt) > prefix else prefix - 1
        result.sources_A += [before_answer, *range(answer_at, answer_at + len(answer) - 1)]
        result.targets_A += answer
    return result


def attend_by_branch(
    module: Any, q_1HSK: Any, k_1JSK: Any, v_1JSK: Any, mask: Any, starts: Sequence[int] = (), **options: Any
) -> tuple[Any, None]:
    """transformers' attention for a `Pack` (H query and J key-value heads of size K): prefix, then branches.

    A branch of B tokens sees the L keys of the prefix and itself. Its last query sees the last key, so the
    causal mask is aligned at the lower right. No mask tensor is made, and no branch pays for the others.
    """
    outputs_1SHK, edges = [], [0, *starts, q_1HSK.shape[2]]
    for start, end in pairwise(edges):
        if start == end:  # no common prefix
            continue
        prefix = starts[0] if start else 0
        k_1JLK = torch.cat([k_1JSK[:, :, :prefix], k_1JSK[:, :, start:end]], 2)
        v_1JLK = torch.cat([v_1JSK[:, :, :prefix], v_1JSK[:, :, start:end]], 2)
        causal = causal_lower_right(end - start, k_1JLK.shape[2])
        q_1HBK, scale = q_1HSK[:, :, start:end], options.get("scaling")
        branch_1HBK = scaled_dot_product_attention(
            q_1HBK, k_1JLK, v_1JLK, attn_mask=causal, scale=scale, enable_gqa=True
        )
        outputs_1SHK.append(branch_1HBK.transpose(1, 2))
    return torch.cat(outputs_1SHK, 1), None


AttentionInterface.register("by_branch", attend_by_branch)


def autocast(base: Any) -> Any:
    """Products of a bfloat16 model in bfloat16, those with its float32 adapter too."""
    return torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16)


VOCABULARY_CHUNK = 2048  # answer tokens whose logits are in memory at a time


def answer_logprobs(model: Any, packed: Pack, temperature: float = 1.0) -> Any:
    """log p of every answer token of `packed` at `temperature`: shape [A], float32, with gradient.

    Only answer positions go through the vocabulary, since most tokens of a judge's prompt are not
    answers; where there are several chunks, each one's logits are computed again in the backward pass.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # `attend_by_branch`: transformers hands `starts`, which it does not know, on to it.
    base.set_attn_implementation("by_branch")
    lists = packed.ids_S, packed.positions_S, packed.sources_A, packed.targets_A
    ids_S, positions_S, sources_A, targets_A = (torch.tensor(x, device=base.device) for x in lists)

    def logprobs_of_chunk(hidden_CD: Any, targets_C: Any) -> Any:
        logits_CV = base.lm_head(hidden_CD).float() / temperature
        return -torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="none")

    with autocast(base):
        output = base.model(
            input_ids=ids_S[None], position_ids=positions_S[None], use_cache=False, starts=packed.starts
        )
        hidden_AD = output.last_hidden_state[0, sources_A]
        chunks = list(zip(hidden_AD.split(VOCABULARY_CHUNK), targets_A.split(VOCABULARY_CHUNK)))
        if len(chunks) == 1:
            return logprobs_of_chunk(*chunks[0])
        return torch.cat([checkpoint(logprobs_of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def check_forward(model: Any, name: str, temperature: float = 0.7) -> None:
    """End the command where `answer_logprobs` differs from the model's own: a window, a cap, a scale …

    Compared as it is trained, in training mode and at a temperature, on two answers to one prompt.
    """
    base, prompt, answers = model.get_base_model(), list(range(20, 40)), ([41, 42, 43, 44], [51, 52, 53, 54])
    with torch.no_grad(), autocast(base):  # the model's own first, for `answer_logprobs` sets our attention
        ids_2S = torch.tensor([prompt + answer for answer in answers], device=base.device)
        logits_2AV = base(ids_2S).logits[:, len(prompt) - 1 : -1].float() / temperature
        (packed,) = pack([(prompt, answer) for answer in answers], 512)
        ours_A = answer_logprobs(model, packed, temperature)
    own_A = logits_2AV.log_softmax(-1).gather(2, ids_2S[:, len(prompt) :, None]).flatten()
    exact = torch.allclose(ours_A, own_A, atol=1e-3 if base.dtype == torch.float32 else 0.3)
    if not exact or getattr(base.config, "sliding_window", None):
        fail(f"{name}: {type(base).__name__} has a window, a scale or such: it would be trained wrongly.")


# --- Agreement with the gold judge, by which the epoch is chosen ----------------------------------


def krippendorff_alpha(units: Iterable[Sequence[float | None]]) -> float | None:
    """Krippendorff's alpha with the interval metric (Krippendorff 2011, "Computing alpha").

    `units`: the ratings of each rated thing, None where a rater gave none. 1 is perfect agreement, 0 what
    chance gives, below 0 systematic disagreement; None where all ratings are the same.
    """
    rated = [[x for x in unit if x is not None] for unit in units]
    rated = [unit for unit in rated if len(unit) > 1]
    everything = [x for unit in rated for x in unit]

    def disagreement(values: Sequence[float]) -> float:
        """The sum of (a - b)^2 over all ordered pairs of n values, over n - 1.

        That sum is 2 n times the sum of (x - mean)^2; so written, no digits are lost to cancellation.
        """
        n, mean = len(values), fmean(values)
        return 2 * n * sum((x - mean) ** 2 for x in values) / (n - 1)

    expected = disagreement(everything) if everything else 0
    return 1 - sum(map(disagreement, rated)) / expected if expected else None


def agreement(judgements: Sequence[Row], pairwise: bool = False) -> dict[str, float | None]:
    """Agreement of judgements (records with gold, label, expected) with gold: alpha x 100, the rest in %.

    None where nothing can be measured. Invalid judgements are left out, and counted. Pairwise: how often the
    judge names gold's choice, also by the place of that choice; a judge without position bias is as often
    right in both. A tie, p(1) = p(2), is half right.
    """
    valid = [j for j in judgements if j["label"] is not None]
    n = max(1, len(judgements))

    def percent(values: Sequence[float]) -> float | None:
        return 100 * fmean(values) if values else None

    if pairwise:
        right: dict[int, list[float]] = {1: [], 2: []}  # by the place of gold's choice
        for j in valid:
            tie = j["expected"] == 1.5
            right[j["gold"]].append(0.5 if tie else float(j["label"] == j["gold"]))
        scores = {"accuracy_1": percent(right[1]), "accuracy_2": percent(right[2])}
        scores["accuracy"] = percent(right[1] + right[2])
        scores["says_1"] = percent([j["label"] == 1 for j in valid])
    else:
        scores = {}
        for name, key in (("alpha", "label"), ("alpha_expected", "expected")):
            alpha = krippendorff_alpha([(j["gold"], j[key]) for j in valid])
            scores[name] = None if alpha is None else 100 * alpha
        scores["exact"] = percent([j["label"] == j["gold"] for j in valid])
    scores |= {"invalid": 100 * (1 - len(valid) / n), "n": len(judgements)}
    return {**scores, "thinking_tokens": sum(j["thinking_tokens"] for j in judgements) / n}


def describe(scores: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'none' if x is None else f'{x:.1f}'}" for name, x in scores.items())


def selection_score(scores: dict[str, Any]) -> float:
    """What an epoch is chosen by: alpha x 100 of the expected score, minus the % of invalid judgements.

    The expected score, because it rewards the policies: the most likely digit can agree with gold while the
    distribution behind it is almost flat. In pairs, in place of alpha: the mean of both places' accuracies.
    """
    names = ("alpha_expected", "accuracy_1", "accuracy_2")
    values = [scores[name] for name in names if scores.get(name) is not None]
    return fmean(values) - scores["invalid"] if values else -math.inf


def judge_row(ask: Callable[..., annotate.Verdict], row: Row) -> annotate.Verdict:
    """The verdict of a judge on an annotated output (or pair)."""
    return ask(row["instruction"], row["output"], row.get("other"))


# --- Finished judges and their server --------------------------------------------------------------


class JudgeRecord(TypedDict, total=False):
    """A finished judge, as judge.json describes it to later stages."""

    adapter: Any  # its folder, beside judge.json; 04 puts the whole path here, None for a base model
    model: str  # the base model
    reasoning: bool  # it thinks before it gives a label
    lora_rank: int
    lora_modules: list[str]
    max_prompt: int  # tokens
    max_thinking: int  # tokens
    temperature: float  # of the thinking
    # The rest is false, empty or missing where it does not apply.
    pairwise: bool  # it says which of two outputs is better
    rubrics: bool  # it is shown gold's rubric of the instruction
    effort: str  # of gold's reasoning that it learnt, if another than that of labels.jsonl
    left_out: float  # the share of the examples that were too long to train on
    validation: dict[str, float | None]  # its agreement with gold
    before: str  # the judge with which GRPO began


NEEDED = ("model", "reasoning", "lora_rank", "lora_modules", "max_prompt", "max_thinking", "temperature")


def served_judge(endpoint: Any, tokenizer: Any, adapter: str | None, record: Any, run: Path) -> Judge:
    """The judge described by `record` (a `JudgeRecord`, or the options it came from) behind `endpoint`."""
    settings = {key: record[key] for key in ("reasoning", "max_thinking", "max_prompt", "temperature")}
    settings["rubrics"] = read_rubrics(run) if record.get("rubrics") else None
    return Judge(endpoint, tokenizer, adapter, **settings, pairwise=record.get("pairwise", False))


def serve_adapters(
    records: Sequence[Row], run: Path, gpus: str, count: int = 1, others_gpus: Sequence[str] = ()
) -> Any:
    """A server of one base model for the adapters of `records` (judges or policies), `count` at a time.

    It takes 0.9 of the memory of its `gpus`, halved for each other program that is on any of them.
    `others_gpus`: the GPUs of each other program.
    """
    neighbours = [theirs for theirs in others_gpus if set(gpus.split(",")) & set(theirs.split(","))]
    memory = 0.9 / 2 ** len(neighbours)
    rooms = [r["max_prompt"] + r.get("max_thinking", 0) + r.get("max_tokens", 0) + 16 for r in records]
    modules = sorted({module for record in records for module in record["lora_modules"]})
    lora = {"rank": max(record["lora_rank"] for record in records), "count": count, "modules": modules}
    model = records[0]["model"]
    room = min(max(rooms), annotate.context_length(model))
    return annotate.serve(model, run / "logs", room, gpus, memory, **lora)


def find_judge(run: Path, name: str) -> tuple[Path, JudgeRecord]:
    """(folder, judge.json) of the judge `name`; 'reasoning' means reasoning-rl if begun, else -sft."""
    folder = run / "judges" / name
    if not folder.exists() and not name.endswith(("-sft", "-rl")):
        folder = run / "judges" / f"{name}-rl"
        if not folder.exists():
            folder = run / "judges" / f"{name}-sft"
    stage = "03_rl.py judge" if folder.name.endswith("-rl") else "02_train_judge.py"
    annotate.require(folder / "judge.json", f"{stage} --run {run}, or ask for another judge")
    record = annotate.read_json(folder / "judge.json", ("adapter", *NEEDED))
    check_adapter(folder / record["adapter"], record["model"], record["lora_rank"])
    return folder, record


def check_adapter(folder: Path, model: str, rank: int) -> Path:
    """`folder`, a PEFT adapter for `model` of `rank`; another base or rank, or a pickle, ends the command."""
    config = annotate.read_json(folder / "adapter_config.json", ["base_model_name_or_path", "r"])
    if (config["base_model_name_or_path"], config["r"]) != (model, rank):
        fail(f"{folder}/adapter_config.json: no adapter of rank {rank} for {model}. Train it again.")
    if not (folder / "adapter_model.safetensors").exists():
        fail(f"{folder} has no adapter_model.safetensors. Train it again.")
    return folder


# --- Several GPUs ---------------------------------------------------------------------------------
# One process (a rank) on each, with the same weights. Every rank works on its share of a batch; one sum
# over the gradients of the adapter, and all take the same optimiser step.


def on_ranks(work: Callable[..., None], gpus: str, *arguments: Any) -> None:
    """Call `work(*arguments)` as one rank on each of `gpus` (on a CPU their number counts).

    A single rank runs in this process. Several get a process each, which ends when this one does; `work` and
    its arguments must then be picklable.
    """
    annotate.pick_gpus(gpus)
    devices = [int(gpu) for gpu in gpus.split(",")]
    if len(devices) == 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(devices[0])
        work(*arguments)
        torch.cuda.empty_cache()  # a server may want this memory next
        return
    address = f"tcp://127.0.0.1:{annotate.free_port()}"
    try:
        torch.multiprocessing.spawn(enter_rank, (devices, address, work, arguments), len(devices))
    except torch.multiprocessing.ProcessExitedException:  # it has said why
        raise SystemExit(1) from None


def enter_rank(
    rank: int, devices: list[int], address: str, work: Callable[..., None], arguments: Any
) -> None:
    """Join the other ranks at `address`, in a process of its own, and work."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which torch sends a rank when its parent is gone
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(devices)))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(devices[rank])
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=len(devices))
    try:
        work(*arguments)
    except openai.APIError as error:
        fail(annotate.server_error(error))
    except RuntimeError as error:
        if " by peer" not in str(error):  # "Connection closed by peer": another rank has ended
            raise
        fail("Another of the processes has ended; why stands above. If nothing does, memory ran out.")


def rank_and_size() -> tuple[int, int]:
    """(rank, number of ranks) of this process; (0, 1) where there is only one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(values: Sequence[float]) -> list[float]:
    """The sums of `values` over the ranks. All wait for each other here."""
    numbers = torch.tensor(values, dtype=torch.float64)  # on the CPU, where gloo adds them
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers.tolist()


def optimizer_step(model: Any, optimizer: Any, lr: float) -> float:
    """Sum the gradients over the ranks (a rank without a share adds zeros), clip, step; their norm."""
    parameters = trainable(model)
    if rank_and_size()[1] > 1:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not math.isfinite(norm):
        fail(f"the gradient's norm is {norm}. Lower --lr.")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


# --- The model, and training that can stop anywhere -----------------------------------------------


def trainable(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def load_training(options: Options, state: Path | None, start: Path | None = None) -> tuple[Any, Any]:
    """(model with a LoRA adapter, AdamW) as `state` left them; without it a new adapter, or that in `start`.

    The frozen base is held in `annotate.precision()`; the adapter, its gradients and Adam's moments in
    float32, for a step of 2e-5 on a weight of 0.02 would round away in bfloat16.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    name, rank, gpu = options["model"], options["lora_rank"], torch.cuda.is_available()
    torch.manual_seed(options["seed"])
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for the products that stay in float32
    dtype = getattr(torch, annotate.precision())
    base = AutoModelForCausalLM.from_pretrained(
        name, use_safetensors=True, dtype=dtype, attn_implementation="sdpa"
    )
    if gpu:
        base = base.cuda()
    if options["checkpointing"]:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if adapter := state or start:
        try:
            model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
            if state:
                moments = torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True)
        except (EOFError, OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
            fail(f"{adapter}: damaged ({type(error).__name__}). Delete {adapter.parent} and train it again.")
    else:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=options["lora_modules"])
        model = peft.get_peft_model(base, config)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # ty: ignore (else peft copies its input to float32)
    adapted = {key.rsplit(".", 1)[-1] for key in model.targeted_module_names}
    if missing := sorted(set(options["lora_modules"]) - adapted):
        fail(f"{name} has no layers named {', '.join(missing)}: a part of it would go untrained.")
    model.train()  # switches checkpointing on; neither these models nor our LoRA use dropout
    check_forward(model, name)
    optimizer = torch.optim.AdamW(trainable(model), lr=options["lr"], weight_decay=0.0, fused=gpu)
    if state:
        optimizer.load_state_dict(moments)
    return model, optimizer


def save_adapter(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)  # else peft asks the hub


def save_state(folder: Path, step: int, model: Any, optimizer: Any) -> None:
    """Write all that `step` finished steps leave behind, in one rename; drop older states."""
    scratch, target = folder / "unfinished", folder / f"state-{step:06d}"
    save_adapter(model, scratch)
    torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    for old in set(folder.glob("state-*")) - {target}:
        shutil.rmtree(old)


def latest_state(folder: Path) -> tuple[int, Path | None]:
    """(finished steps, folder of the newest whole state), or (0, None)."""
    states = sorted(folder.glob("state-*"))
    return (int(states[-1].name.removeprefix("state-")), states[-1]) if states else (0, None)


def rewind(path: Path, steps: int) -> None:
    """Keep the records of the first `steps` steps: later ones will be made again."""
    annotate.write_jsonl(path, [r for r in annotate.read_jsonl(path, ["step"]) if r["step"] < steps])


# --- Fine-tuning, and which epoch is kept ---------------------------------------------------------

SAVE_EVERY = 10  # optimiser steps: what a killed run loses at most


def labelled(run: Path, split: str, effort: str = "", pairwise: bool = False) -> list[Row]:
    """The annotated outputs (or pairs) of `split` that carry a gold label.

    `effort`: another than that of labels.jsonl, and only examples that got the same label at both.
    """
    name, option = "labels", ""
    if pairwise:
        name, option = "pairs", "--pairs"
    elif effort:
        name, option = f"labels-{effort}", f"--efforts {effort}"
    path = run / "annotations" / f"{name}.jsonl"
    annotate.require(path.with_suffix(".json"), f"01_annotate.py --run {run} {option}")
    rows = annotate.read_jsonl(path, ["id", "split", "instruction", "output", "label", "reasoning"])
    return [row for row in rows if row["split"] == split and row["label"] is not None]


def training_rows(options: Options, run: Path) -> list[Row]:
    """The examples to train on, the same on every rank."""
    rows = labelled(run, "judge_train", options["effort"], options["pairwise"])
    if options["reasoning"]:
        rows = [row for row in rows if row["reasoning"]]
    if not rows or options["examples"] > len(rows):
        fail(f"{run}/annotations: {len(rows)} examples to train on, --examples {options['examples']}.")
    if options["examples"]:
        rows = random.Random(options["seed"]).sample(rows, options["examples"])
    return rows


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up over the first 3 % of the steps, then linear decay to 0 (as the paper's SFT)."""
    ramp = max(1, round(warmup * steps))
    return peak * min((step + 1) / ramp, (steps - step) / max(1, steps - ramp))


def share_of_rank(examples: Sequence[Example], rank: int, ranks: int) -> list[Example]:
    """The neighbouring `examples` that `rank` takes: all ranks get about as many tokens, as thoughts vary.

    All examples are laid end to end and their tokens cut into `ranks` equal stretches; an example goes to the
    stretch in which its middle lies.
    """
    sizes = [len(prompt) + len(answer) for prompt, answer in examples]
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes)]
    return [example for example, m in zip(examples, middles) if int(ranks * m / sum(sizes)) == rank]


def fine_tune(options: Options, run: Path, folder: Path) -> None:
    """Minimise the mean cross-entropy of the answer tokens, on every rank; one adapter an epoch. Resumes."""
    rows, tokenizer = training_rows(options, run), annotate.load_tokenizer(options["model"])
    rubrics = read_rubrics(run) if options["rubrics"] else None
    size, batches_an_epoch = options["batch"], math.ceil(len(rows) / options["batch"])
    steps = options["epochs"] * batches_an_epoch
    done, state = latest_state(folder)
    rank, ranks = rank_and_size()
    model, optimizer = load_training(options, state)
    if rank == 0:
        print(f"{len(rows)} examples, {steps} steps, {done} of them done", flush=True)
        rewind(folder / "metrics.jsonl", done)

    def example(row: Row) -> Example:
        thinking = row["reasoning"] if options["reasoning"] else None
        prompt = judge_prompt(tokenizer, row_messages(row, rubrics), options["reasoning"])
        return prompt, judge_answer(tokenizer, row["label"], thinking)

    for step in tqdm(range(done, steps), initial=done, total=steps, desc="fine-tuning", disable=rank > 0):
        began = time.perf_counter()
        epoch, place = divmod(step, batches_an_epoch)  # place: which batch of the epoch
        shuffled = random.Random(f"{options['seed']} {epoch}").sample(rows, len(rows))
        # Sorted, so that neighbours share as long a prefix as they can; a rank's share are neighbours.
        batch = sorted(shuffled[place * size :][:size], key=lambda row: (row["instruction"], row["output"]))
        max_prompt, max_answer = options["max_prompt"], options["max_thinking"]
        fitting = [(p, a) for p, a in map(example, batch) if len(p) <= max_prompt and len(a) <= max_answer]
        if not fitting and step == done:
            fail(f"{folder}: no example of step {step} fits --max-prompt and --max-thinking. Raise them.")
        tokens, loss = sum(len(answer) for _, answer in fitting), 0.0
        for packed in pack(share_of_rank(fitting, rank, ranks), options["tokens_per_pass"]):
            part_of_loss = -answer_logprobs(model, packed).sum() / tokens
            part_of_loss.backward()
            loss += part_of_loss.item()
        lr = learning_rate(step, steps, options["lr"])
        norm = optimizer_step(model, optimizer, lr)
        record = {"step": step, "epoch": epoch, "loss": over_ranks([loss])[0], "lr": lr, "grad_norm": norm}
        record |= {"tokens": tokens, "left_out": len(batch) - len(fitting)}
        if rank == 0:
            seconds, epoch_ends = time.perf_counter() - began, place + 1 == batches_an_epoch
            annotate.append_jsonl(folder / "metrics.jsonl", {**record, "seconds": seconds})
            if epoch_ends:
                save_adapter(model, folder / f"epoch-{epoch + 1}")
            if epoch_ends or (step + 1) % SAVE_EVERY == 0:
                save_state(folder, step + 1, model, optimizer)


def choose_epoch(options: Options, run: Path, folder: Path) -> None:
    """Judge the validation outputs with each epoch's adapter; the best `selection_score` makes the judge."""
    tasks = {row["id"]: row for row in labelled(run, "judge_validation", pairwise=options["pairwise"])}
    tokenizer, scores = annotate.load_tokenizer(options["model"]), {}
    with serve_adapters([options], run, options["gpus"]) as endpoint:
        for epoch in range(1, options["epochs"] + 1):
            name, path = f"epoch-{epoch}", folder / f"validation-{epoch}.jsonl"
            endpoint.load_adapter(name, folder / name)
            ask = partial(ask_judge, served_judge(endpoint, tokenizer, name, options, run))
            records = annotate.map_to_jsonl(path, tasks, partial(judge_row, ask), name, options["threads"])
            judged = [{**record, "gold": tasks[record["id"]]["label"]} for record in records]
            scores[name] = agreement(judged, options["pairwise"])
            print(f"{name}: {describe(scores[name])}", flush=True)
            endpoint.unload_adapter(name)
    best = max(scores, key=lambda name: selection_score(scores[name]))
    record = {key: options[key] for key in JudgeRecord.__annotations__ if key in options}
    steps = annotate.read_jsonl(folder / "metrics.jsonl", ["left_out"])
    drawn = options["epochs"] * len(training_rows(options, run))
    record["left_out"] = sum(step["left_out"] for step in steps) / drawn
    # With reasoning, those left out are the cases that gold thought about longest.
    print(f"{record['left_out']:.1%} of the examples were too long to train on, and left out")
    annotate.write_json(folder / "judge.json", {**record, "adapter": best, "validation": scores[best]})


# --- The command ----------------------------------------------------------------------------------

LARGE = {"lr": 1e-4, "epochs": 2, "batch": 128, "max_thinking": 4096, "max_prompt": 4096, "temperature": 0.7}
LARGE |= {"checkpointing": True}
PRESETS = {
    "gpu": {**LARGE, "model": annotate.SMALL_MODEL, "lora_rank": 32, "tokens_per_pass": 8192, "threads": 256},
    "node": {**LARGE, "model": "Qwen/Qwen3-4B", "lora_rank": 64, "tokens_per_pass": 8192, "threads": 1024}
    | {"gpus": "0,1,2,3,4,5,6,7"},
}


def modules_of(preset: str) -> list[str]:
    """The linear layers that get an adapter; attention's alone train twice as fast on a CPU."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return attention if preset == "laptop" else [*attention, "gate_proj", "up_proj", "down_proj"]


def check_rank(value: int) -> int:
    if value not in (ranks := (1, 8, 16, 32, 64, 128, 256, 320, 512)):
        raise typer.BadParameter(f"vLLM serves the ranks {ranks}")
    return value


def check_name(value: str) -> str:
    """A `--name` names a folder (no slash), and is part of ids and of stage 4's NAME:STEP (no colon)."""
    if not re.fullmatch(r"(\w[\w.-]*)?", value) or value == "base":
        raise typer.BadParameter("letters, digits, '.', '_' and '-'; and not 'base'")
    return value


Run = Annotated[Path, annotate.run_option(PRESETS)]
LoraRank = Annotated[int, Option(callback=check_rank, help="Rank of the adapter. Paper: full fine-tuning.")]
TokensPerPass = Annotated[int, Option(min=1, help="Tokens of one forward pass: a matter of memory only.")]
Checkpointing = Annotated[bool, Option(help="Keep no activations, for a third more compute.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=(__doc__ or "").split("\n\n")[0])
def main(
    run: Run,
    reasoning: Annotated[bool, Option("--reasoning/--no-reasoning", help="Learn gold's reasoning too.")],
    effort: Annotated[str, Option(help="Of the reasoning to learn, e.g. low (01 --efforts).")] = "",
    pairwise: Annotated[bool, Option("--pairwise", help="Learn which of two is better.")] = False,
    rubrics: Annotated[bool, Option("--rubrics", help="Show the judge gold's rubrics.")] = False,
    model: Annotated[str, Option(help="Base model. Paper: Qwen3-1.7B to 14B.")] = annotate.LAPTOP_MODEL,
    lora_rank: LoraRank = 16,
    lr: Annotated[float, Option(min=1e-9, max=1, help="Peak rate. Paper: 1e-5, all weights.")] = 2e-3,
    batch: Annotated[int, Option(min=1, help="Examples of one optimiser step. Paper: 128.")] = 3,
    epochs: Annotated[int, Option(min=1, help="Paper: 1-2 direct, 2-3 reasoning; best is kept.")] = 1,
    max_thinking: Annotated[int, Option(min=1, help="Tokens, twice in pairs. Paper: 4096.")] = 96,
    max_prompt: Annotated[int, Option(min=1, help="Tokens, twice in pairs. Paper: 4096.")] = 512,
    temperature: Annotated[float, Option(min=0, max=2, help="Of the thinking. Paper: 0.7 in RL.")] = 0.0,
    tokens_per_pass: TokensPerPass = 1024,
    checkpointing: Checkpointing = False,
    threads: annotate.Threads = 64,
    gpus: annotate.Gpus = "0",
    seed: annotate.Seed = 0,
    examples: Annotated[int, Option(min=0, help="So many, drawn by the seed; 0: all. Paper: 164K.")] = 0,
    name: Annotated[
        str, Option(callback=check_name, help="RUN/judges/NAME-sft. Default: direct or reasoning, variant.")
    ] = "",
) -> None:
    options = dict(locals())  # the options by their names: nothing else has a value yet
    del options["run"], options["name"]
    gold = annotate.read_options(run / "annotations")
    options["lora_modules"] = modules_of(gold["preset"])
    if effort and (pairwise or not reasoning):
        fail("--effort is about the reasoning of pointwise judges; leave it out.")
    if effort == gold["gold_effort"] or (effort == "high" and gold["gold_effort"] == "none"):
        options["effort"] = ""  # that of labels.jsonl itself
    if pairwise:  # two outputs to read and to reason about
        options |= {"max_thinking": 2 * max_thinking, "max_prompt": 2 * max_prompt}
    check_context(model, options["max_prompt"] + options["max_thinking"], "--max-prompt and --max-thinking")
    kind = "reasoning" if reasoning else "direct"
    variants = ["pairwise" if pairwise else "", options["effort"], "rubrics" if rubrics else ""]
    folder = run / "judges" / f"{name or '-'.join([kind, *filter(None, variants)])}-sft"
    training_rows(options, run)  # missing data end the command here
    annotate.record_config(folder, options)
    if not (folder / "judge.json").exists():
        on_ranks(fine_tune, gpus, options, run, folder)
        choose_epoch(options, run, folder)
    judge = annotate.read_json(folder / "judge.json", ["adapter", "validation"])
    print(f"{folder}: {judge['adapter']}. On validation: {describe(judge['validation'])}")


def check_context(model: str, tokens: int, options: str) -> None:
    """End the command, before any work, where what `options` ask for does not fit the model's context."""
    annotate.load_tokenizer(model)  # or the model does not exist
    if tokens + 16 > (context := annotate.context_length(model)):
        fail(f"{options}: {tokens} tokens and some; the context of {model} is {context}. Lower them.")


if __name__ == "__main__":
    annotate.start(app)
