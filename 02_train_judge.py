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

    python 02_train_judge.py --preset laptop --run runs/demo --no-reasoning
    python 02_train_judge.py --preset laptop --run runs/demo --reasoning
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import openai
import torch
import torch.distributed as dist
import typer
from tqdm import tqdm
from typer import Option

annotate = import_module("01_annotate")
encode, fail = annotate.encode, annotate.fail
Row, Options, Verdict = dict[str, Any], dict[str, Any], dict[str, Any]

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
    opening = "" if tokenizer.decode(ids[-6:]).endswith(THINK_OPEN) else THINK_OPEN  # some templates open it
    if reasoning:
        return ids + encode(tokenizer, opening)
    return ids + encode(tokenizer, opening + "\n") + thinking_end(tokenizer)


def judge_answer(tokenizer: Any, label: int, thinking: str | None) -> list[int]:
    """The token ids that answer `judge_prompt`: [thinking, its end,] the digit, end of turn."""
    ids = [*label_token_ids(tokenizer, str(label)), tokenizer.eos_token_id]
    if thinking is None:
        return ids
    safe = annotate.escape_special_tokens(thinking, tokenizer)
    return encode(tokenizer, safe + "\n") + thinking_end(tokenizer) + ids


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
    text = row["instruction"]
    if rubrics is not None and text not in rubrics:
        fail(f"this judge was trained with rubrics, and 01 made none for the instruction {text[:60]!r}.")
    return annotate.judge_messages(text, row["output"], row.get("other"), (rubrics or {}).get(text, ""))


def ask_judge(
    judge: Judge, text: str, output: str, other: str | None = None, messages: Any = None
) -> Verdict:
    """Let `judge` grade one output for the instruction `text`, or a pairwise one say which of two is better.

    [reasoning: sample until `</think>`], then one token constrained to the labels. Their log-probabilities
    give the label (the most probable) and the expected score, the sum of x * p(x), which is the policy's
    reward (paper, section 2.3). Of a pairwise judge P(the first is better) = 2 - expected. A prompt that is
    too long, thinking that does not close, or a request that the server refuses make the judgement invalid:
    no label, no score, and a `cause`.
    """
    row = {"instruction": text, "output": output, "other": other}
    prompt = judge_prompt(judge.tokenizer, messages or row_messages(row, judge.rubrics), judge.reasoning)
    verdict = dict.fromkeys(("label", "expected", "probabilities")) | {"thinking": "", "thinking_tokens": 0}
    if len(prompt) > judge.max_prompt:
        return {**verdict, "cause": "prompt too long"}
    labels = annotate.PAIRWISE_LABELS if judge.pairwise else annotate.LABELS
    ids, before = label_token_ids(judge.tokenizer, labels), prompt
    how = {"max_tokens": 1, "temperature": 1.0, "logprobs": len(ids)}
    constrained = {"allowed_token_ids": ids, "return_tokens_as_token_ids": True}
    thinking = {"temperature": judge.temperature, "top_p": 0.95, "max_tokens": judge.max_thinking}
    thinking["stop"] = [THINK_CLOSE]
    thinking["extra"] = {"top_k": 20, "include_stop_str_in_output": True}
    try:
        if judge.reasoning:
            (thought,) = judge.endpoint.sample(prompt, 1, judge.adapter, **thinking)
            verdict["thinking"] = thought.text.removesuffix(THINK_CLOSE).strip()
            verdict["thinking_tokens"] = len(thought.tokens_T)
            if not thought.text.endswith(THINK_CLOSE):
                return {**verdict, "cause": "thinking did not close"}
            before = prompt + thought.tokens_T + encode(judge.tokenizer, AFTER_THINKING)
        ask = judge.endpoint.client(prompt).completions.create
        served = judge.adapter or judge.endpoint.model
        answer = ask(model=served, prompt=before, extra_body=constrained, **how)
    except openai.APIStatusError as error:
        return {**verdict, "cause": judge.endpoint.refusal(error)}
    top = answer.choices[0].logprobs.top_logprobs[0]
    weights = [math.exp(top.get(f"token_id:{i}", -math.inf)) for i in ids]
    if abs(sum(weights) - 1) > 1e-3:
        fail(f"{judge.endpoint.url}: not constrained to the labels: their probability is {sum(weights):.4f}")
    verdict["probabilities"] = [weight / sum(weights) for weight in weights]
    verdict["expected"] = sum(int(label) * p for label, p in zip(labels, verdict["probabilities"]))
    verdict["label"] = int(max(zip(verdict["probabilities"], labels), key=lambda pair: pair[0])[1])
    return {**verdict, "cause": None}


# --- Fine-tuning ----------------------------------------------------------------------------------

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its answer
SAVE_EVERY = 10  # optimiser steps: what a killed run loses at most


def labelled(run: Path, split: str, reasoning: bool = False, effort: str = "", pairwise: bool = False) -> Any:
    """The annotated outputs (or pairs) of `split` that carry a gold label (and a reasoning, if asked for).

    `effort`: another than that of labels.jsonl, and only examples that got the same label at both.
    """
    name = "pairs" if pairwise else f"labels-{effort}" if effort else "labels"
    path = run / "annotations" / f"{name}.jsonl"
    flag = " --pairs" if pairwise else f" --efforts {effort}" if effort else ""
    annotate.require(path.with_suffix(".json"), f"01_annotate.py --run {run}{flag}")
    rows = annotate.read_jsonl(path, ["id", "split", "instruction", "output", "label", "reasoning"])
    rows = [row for row in rows if row["split"] == split and row["label"] is not None]
    return [row for row in rows if row["reasoning"] or not reasoning]


def training_rows(options: Options, run: Path) -> list[Row]:
    """The examples to train on, the same on every rank."""
    rows = labelled(run, "judge_train", *(options[key] for key in ("reasoning", "effort", "pairwise")))
    if not rows or options["examples"] > len(rows):
        fail(f"{run}/annotations: {len(rows)} examples to train on, --examples {options['examples']}.")
    return random.Random(options["seed"]).sample(rows, options["examples"]) if options["examples"] else rows


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up over the first 3 % of the steps, then linear decay to 0 (as the paper's SFT)."""
    ramp = max(1, round(warmup * steps))
    return peak * min((step + 1) / ramp, (steps - step) / max(1, steps - ramp))


def sft(options: Options, run: Path, folder: Path) -> None:
    """Minimise the mean cross-entropy of the answer tokens, on every rank; one adapter an epoch. Resumes."""
    rows, tokenizer = training_rows(options, run), annotate.load_tokenizer(options["model"])
    rubrics = read_rubrics(run) if options["rubrics"] else None
    size, batches = options["batch"], math.ceil(len(rows) / options["batch"])
    steps, (first, state), (rank, ranks) = options["epochs"] * batches, latest_state(folder), rank_and_size()
    model, optimizer = load_training(options, state)
    if rank == 0:
        print(f"{len(rows)} examples, {steps} steps, {first} of them done", flush=True)
        rewind(folder / "metrics.jsonl", first)

    def example(row: Row) -> Pair:
        thinking = row["reasoning"] if options["reasoning"] else None
        prompt = judge_prompt(tokenizer, row_messages(row, rubrics), options["reasoning"])
        return prompt, judge_answer(tokenizer, row["label"], thinking)

    for step in tqdm(range(first, steps), initial=first, total=steps, desc="fine-tuning", disable=rank > 0):
        began, (epoch, place) = time.perf_counter(), divmod(step, batches)
        order = random.Random(f"{options['seed']} {epoch}").sample(rows, len(rows))
        # Sorted, so that neighbours share as long a prefix as they can; a rank's share are neighbours.
        batch = sorted(order[place * size :][:size], key=lambda row: (row["instruction"], row["output"]))
        pairs = [example(row) for row in batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]]
        limits = options["max_prompt"], options["max_thinking"]
        pairs = [(p, a) for p, a in pairs if len(p) <= limits[0] and len(a) <= limits[1]]
        tokens, used = over_ranks([sum(len(answer) for _, answer in pairs), len(pairs)])
        if not used and step == first:
            fail(f"{folder}: no example of step {step} fits --max-prompt and --max-thinking. Raise them.")
        loss = 0.0
        for packed in pack(pairs, options["tokens_per_pass"]):
            part = -answer_logprobs(model, packed).sum() / tokens
            part.backward()
            loss += part.item()
        lr = learning_rate(step, steps, options["lr"])
        norm = optimizer_step(model, optimizer, lr)
        record = {"step": step, "epoch": epoch, "loss": over_ranks([loss])[0], "lr": lr, "grad_norm": norm}
        record |= {"tokens": tokens, "left_out": len(batch) - used, "seconds": time.perf_counter() - began}
        if rank == 0:
            annotate.append_jsonl(folder / "metrics.jsonl", record)
            if place + 1 == batches:
                share = share_left_out(folder, (epoch + 1) * len(rows))
                tqdm.write(f"epoch {epoch + 1}: {share:.1%} of the examples were too long and left out")
                save_adapter(model, folder / f"epoch-{epoch + 1}")
            if place + 1 == batches or (step + 1) % SAVE_EVERY == 0:
                save_state(folder, step + 1, model, optimizer)


def share_left_out(folder: Path, examples: int) -> float:
    """The share of `examples` left out of training as too long: with reasoning, gold's careful cases."""
    records = annotate.read_jsonl(folder / "metrics.jsonl", ["left_out"])
    return sum(record["left_out"] for record in records) / examples


# --- Packing: several (prompt, answer) pairs in one forward pass, their common prefix only once ---


@dataclass
class Pack:
    """One forward pass over a shared prefix and the branches behind it; S tokens, A answer tokens.

    A token sees the prefix and its own branch up to itself; its position counts as if the branch stood alone
    behind the prefix. The hidden state at `sources_A[i]` predicts the answer token `targets_A[i]`, which
    belongs to the pair number `owners_A[i]` of the packed list.
    """

    ids_S: list[int]
    positions_S: list[int]
    starts: list[int]  # where each branch begins
    sources_A: list[int]
    targets_A: list[int]
    owners_A: list[int]


def pack(pairs: Sequence[Pair], budget: int) -> Iterator[Pack]:
    """Pack `pairs`, in order, into forward passes of at most `budget` tokens (one pair may exceed it).

    A pair joins those before it where that costs no more tokens than a new pass.
    """
    members: list[int] = []
    for index in range(len(pairs)):
        parts = members, [index], [*members, index]
        before, alone, both = (len(build_pack(pairs, part).ids_S) if part else 0 for part in parts)
        if members and both > min(budget, before + alone):
            yield build_pack(pairs, members)
            members = []
        members.append(index)
    if members:
        yield build_pack(pairs, members)


def build_pack(pairs: Sequence[Pair], members: Sequence[int]) -> Pack:
    prompts = [pairs[i][0] for i in members]
    first, last = min(prompts), max(prompts)  # in dictionary order: what these share, all share
    prefix = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    result = Pack(first[:prefix], list(range(prefix)), [], [], [], [])
    for index in members:
        prompt, answer = pairs[index]
        result.starts.append(len(result.ids_S))
        first = len(result.ids_S) + len(prompt) - prefix  # of the answer; its predictor is one before
        tokens = [*prompt[prefix:], *answer[:-1]]  # nothing follows the last token, so it is not fed
        result.ids_S += tokens
        result.positions_S += range(prefix, prefix + len(tokens))
        result.sources_A.append(first - 1 if len(prompt) > prefix else prefix - 1)
        result.sources_A += range(first, first + len(answer) - 1)
        result.targets_A += answer
        result.owners_A += [index] * len(answer)
    return result


def answer_logprobs(model: Any, packed: Pack, temperature: float = 1.0) -> Any:
    """log p(target) of every answer token, shape [A], float32, with gradient.

    Only answer positions go through the vocabulary: most tokens of a judge's prompt are not answers.
    """
    from transformers import AttentionInterface

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    AttentionInterface.register("by_branch", attend_by_branch)
    base.set_attn_implementation("by_branch")
    lists = packed.ids_S, packed.positions_S, packed.sources_A, packed.targets_A
    ids_S, positions_S, sources_A, targets_A = (torch.tensor(x, device=base.device) for x in lists)
    how = {"position_ids": positions_S[None], "use_cache": False, "starts": packed.starts}
    hidden_SD = base.model(input_ids=ids_S[None], **how).last_hidden_state[0]
    logits_AV = base.lm_head(hidden_SD[sources_A] / temperature).float()
    return -torch.nn.functional.cross_entropy(logits_AV, targets_A, reduction="none")


def attend_by_branch(
    module: Any, q_1HSK: Any, k_1GSK: Any, v_1GSK: Any, mask: Any, starts: Sequence[int] = (), **how: Any
) -> Any:
    """transformers' attention, branch by branch of a `Pack`: none pays for looking at the others."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    outputs, edges = [], [0, *starts, q_1HSK.shape[2]]
    for start, end in ((start, end) for start, end in pairwise(edges) if start < end):
        prefix = starts[0] if start else 0
        k_1GTK, v_1GTK = (torch.cat([x[:, :, :prefix], x[:, :, start:end]], 2) for x in (k_1GSK, v_1GSK))
        sees_ST = torch.ones(end - start, prefix + end - start, dtype=torch.bool, device=q_1HSK.device)
        more = {**how, "attention_mask": sees_ST.tril(prefix)[None, None]}
        outputs.append(sdpa_attention_forward(module, q_1HSK[:, :, start:end], k_1GTK, v_1GTK, **more)[0])
    return torch.cat(outputs, 1), None


def check_forward(model: Any, name: str) -> None:
    """End the command where `answer_logprobs` is not the class's own forward pass (scale, window, …)."""
    base, prompt, answers = model.get_base_model(), list(range(20, 40)), ([41, 42, 43, 44], [51, 52, 53, 54])
    with torch.no_grad():  # its own first, for `answer_logprobs` sets our attention
        ids_BS = torch.tensor([prompt + answer for answer in answers], device=base.device)
        logits_BAV = base(ids_BS).logits[:, len(prompt) - 1 : -1].float()
        (ours_A,) = (answer_logprobs(model, packed) for packed in pack([(prompt, a) for a in answers], 512))
    own_A = logits_BAV.log_softmax(-1).gather(2, ids_BS[:, len(prompt) :, None]).flatten()
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

    def disagreement(values: Sequence[float]) -> float:  # the sum of (a - b)^2 over ordered pairs, per value
        mean = fmean(values)
        return 2 * len(values) * sum((x - mean) ** 2 for x in values) / (len(values) - 1)

    expected = disagreement(everything) if everything else 0
    return 1 - sum(map(disagreement, rated)) / expected if expected else None


def agreement(judgements: Sequence[Row], pairwise: bool = False) -> dict[str, float | None]:
    """Agreement of judgements (records with gold, label, expected) with gold, in per cent; None: no measure.

    Invalid judgements are left out, and counted. Pairwise: how often the judge names gold's choice, also by
    the place of that choice; a judge without position bias is as often right in both.
    """
    valid, n = [j for j in judgements if j["label"] is not None], max(1, len(judgements))

    def percent(hits: Sequence[float]) -> float | None:
        return 100 * fmean(hits) if hits else None

    def alpha(key: str) -> float | None:
        value = krippendorff_alpha([(j["gold"], j[key]) for j in valid])
        return None if value is None else 100 * value

    if pairwise:  # a tie, 0.5 : 0.5, is half right
        hits = [(j["gold"], 0.5 if j["expected"] == 1.5 else j["label"] == j["gold"]) for j in valid]
        right = {gold: [hit for place, hit in hits if gold in (0, place)] for gold in (0, 1, 2)}
        scores = {f"accuracy_{gold}": percent(right[gold]) for gold in (1, 2)}
        scores |= {"accuracy": percent(right[0]), "says_1": percent([j["label"] == 1 for j in valid])}
    else:
        scores = {"alpha": alpha("label"), "alpha_expected": alpha("expected")}
        scores["exact"] = percent([j["label"] == j["gold"] for j in valid])
    scores |= {"invalid": 100 * (1 - len(valid) / n), "n": len(judgements)}
    return {**scores, "thinking_tokens": sum(j["thinking_tokens"] for j in judgements) / n}


def describe(scores: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'none' if x is None else f'{x:.1f}'}" for name, x in scores.items())


def selection_score(scores: dict[str, Any]) -> float:
    """What an epoch is chosen by: alpha of the expected score, minus the per cent of invalid judgements.

    The expected score, because it rewards the policies: the most likely digit can agree with gold while the
    distribution behind it is almost flat. In pairs: the mean accuracy of both places of gold's choice.
    """
    names = ("alpha_expected", "accuracy_1", "accuracy_2")
    values = [scores[name] for name in names if scores.get(name) is not None]
    return fmean(values) - scores["invalid"] if values else -math.inf


def judge_row(ask: Callable[..., Verdict], row: Row) -> Row:
    """The verdict of a judge on an annotated output (or pair), beside gold's label."""
    return {"gold": row["label"], **ask(row["instruction"], row["output"], row.get("other"))}


# What a later stage must know of a judge, beside where its adapter is.
DESCRIBES = ("model", "reasoning", "lora_rank", "lora_modules", "max_thinking", "temperature", "max_prompt")
VARIANTS = ("effort", "rubrics", "pairwise")


def choose_epoch(options: Options, run: Path, folder: Path) -> None:
    """Judge the validation outputs with each epoch's adapter; the best `selection_score` makes the judge."""
    tasks = {row["id"]: row for row in labelled(run, "judge_validation", pairwise=options["pairwise"])}
    tokenizer, scores = annotate.load_tokenizer(options["model"]), {}
    with serve_adapters([options], run, options["gpus"]) as endpoint:
        for name in (f"epoch-{epoch}" for epoch in range(1, options["epochs"] + 1)):
            endpoint.load_adapter(name, folder / name)
            ask = partial(ask_judge, open_judge(endpoint, tokenizer, name, options, run))
            path, work = folder / f"validation-{name[6:]}.jsonl", partial(judge_row, ask)
            records = annotate.map_to_jsonl(path, tasks, work, name, options["threads"])
            scores[name] = agreement(records, options["pairwise"])
            print(f"{name}: {describe(scores[name])}", flush=True)
            endpoint.unload_adapter(name)
    best = max(scores, key=lambda name: selection_score(scores[name]))
    record = {key: options[key] for key in (*DESCRIBES, *VARIANTS)}
    examples = options["epochs"] * len(training_rows(options, run))
    record["left_out"] = share_left_out(folder, examples)
    annotate.write_json(folder / "judge.json", {**record, "adapter": best, "validation": scores[best]})


def open_judge(endpoint: Any, tokenizer: Any, adapter: str | None, record: Row, run: Path) -> Judge:
    """The judge described by `record` (a judge.json, or the options it came from) behind `endpoint`."""
    settings = {key: record[key] for key in ("reasoning", "max_thinking", "max_prompt", "temperature")}
    settings["rubrics"] = read_rubrics(run) if record.get("rubrics") else None
    return Judge(endpoint, tokenizer, adapter, **settings, pairwise=record.get("pairwise", False))


def serve_adapters(records: Sequence[Row], run: Path, gpus: str, count: int = 1, memory: float = 0.9) -> Any:
    """A server of one base model for the adapters of `records` (judges or policies), `count` at a time."""
    rooms = [r["max_prompt"] + r.get("max_thinking", 0) + r.get("max_tokens", 0) + 16 for r in records]
    modules = sorted({module for record in records for module in record["lora_modules"]})
    lora = {"rank": max(record["lora_rank"] for record in records), "count": count, "modules": modules}
    model = records[0]["model"]
    room = min(max(rooms), annotate.context_length(model))
    return annotate.serve(model, run / "logs", room, gpus, memory, **lora)


def find_judge(run: Path, name: str) -> tuple[Path, Row]:
    """(folder, judge.json) of the judge `name`; 'reasoning' means reasoning-rl if begun, else -sft."""
    folder = run / "judges" / name
    if not folder.exists() and not name.endswith(("-sft", "-rl")):
        folder = run / "judges" / f"{name}-{'rl' if (run / 'judges' / f'{name}-rl').exists() else 'sft'}"
    stage = "03_rl.py judge" if folder.name.endswith("-rl") else "02_train_judge.py"
    annotate.require(folder / "judge.json", f"{stage} --run {run}, or ask for another judge")
    record = annotate.read_json(folder / "judge.json", ("adapter", *DESCRIBES))
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
    """Call `work(*arguments)` as one rank on each of `gpus` (on a CPU their number counts), by torch.

    A single rank runs in this process. Several end with it; what `work` and `arguments` are must pickle.
    """
    annotate.pick_gpus(gpus)
    if "," in gpus:
        address = f"tcp://127.0.0.1:{annotate.free_port()}"
        try:
            torch.multiprocessing.spawn(enter_rank, (gpus, address, work, arguments), gpus.count(",") + 1)
        except torch.multiprocessing.ProcessExitedException as error:  # it has said why
            raise SystemExit(error.exit_code) from None
    else:
        enter_rank(0, gpus, "", work, arguments)
        torch.cuda.empty_cache()  # a server may want this memory next


def enter_rank(rank: int, gpus: str, address: str, work: Callable[..., None], arguments: Any) -> None:
    devices, on_gpu = [int(gpu) for gpu in gpus.split(",")], torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(devices[rank])
    if address:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which torch sends a rank when its parent is gone
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(devices)))
        how = {"init_method": address, "rank": rank, "world_size": len(devices)}
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **how)
    try:
        work(*arguments)
    except openai.APIError as error:
        if not address:  # `start` says it, and names the log
            raise
        fail(f"{error.request.url}: {error} To resume, run the same command again.")


def rank_and_size() -> tuple[int, int]:
    """(rank, number of ranks) of this process; (0, 1) where there is only one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(values: Sequence[float]) -> list[float]:
    """The sums of `values` over the ranks. All wait for each other here."""
    numbers = torch.tensor(values, dtype=torch.float64)  # on the CPU: gloo
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers.tolist()


def optimizer_step(model: Any, optimizer: Any, lr: float) -> float:
    """Sum the gradients over the ranks (a rank without a share brings zeros), clip them, step; their norm."""
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

    The base stays in bfloat16 on a GPU (float32 on a CPU); peft keeps the adapter in float32.
    """
    import peft
    from transformers import AutoModelForCausalLM

    name, rank, gpu = options["model"], options["lora_rank"], torch.cuda.is_available()
    torch.manual_seed(options["seed"])
    how = {"dtype": torch.bfloat16 if gpu else torch.float32, "attn_implementation": "sdpa"}
    base = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **how)
    base = base.cuda() if gpu else base
    if gpu:  # trade a third more compute for not keeping activations
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if adapter := state or start:
        model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    else:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=options["lora_modules"])
        model = peft.get_peft_model(base, config)
    check_forward(model, name)
    model.train()  # switches checkpointing on; neither these models nor our LoRA use dropout
    optimizer = torch.optim.AdamW(trainable(model), lr=options["lr"], weight_decay=0.0)
    if state:
        saved = torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True)  # any GPU's
        optimizer.load_state_dict(saved)
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


# --- The command ----------------------------------------------------------------------------------

LARGE = {"lr": 1e-4, "batch": 128, "max_thinking": 4096, "max_prompt": 4096, "temperature": 0.7}
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


Run, Preset, _ = annotate.run_and_preset(PRESETS)
LoraRank = Annotated[int, Option(callback=check_rank, help="Rank of the adapter. Paper: full fine-tuning.")]
TokensPerPass = Annotated[int, Option(min=1, help="Tokens of one forward pass: a matter of memory only.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=(__doc__ or "").split("\n\n")[0])
def main(
    ctx: typer.Context,
    run: Run,
    reasoning: Annotated[bool, Option("--reasoning/--no-reasoning", help="Learn gold's reasoning too.")],
    preset: Preset = None,
    effort: Annotated[str, Option(help="Of the reasoning to learn, e.g. low (01 --efforts).")] = "",
    pairwise: Annotated[bool, Option("--pairwise", help="Learn which of two is better.")] = False,
    rubrics: Annotated[bool, Option("--rubrics", help="Show the judge gold's rubrics.")] = False,
    model: Annotated[str, Option(help="Base model. Paper: Qwen3-1.7B to 14B.")] = annotate.LAPTOP_MODEL,
    lora_rank: LoraRank = 16,
    lr: Annotated[float, Option(min=1e-9, max=1, help="Peak rate. Paper: 1e-5, all weights.")] = 2e-3,
    batch: Annotated[int, Option(min=1, help="Examples of one optimiser step. Paper: 128.")] = 4,
    epochs: Annotated[int, Option(min=1, help="Paper: 1-2 direct, 2-3 reasoning; best is kept.")] = 2,
    max_thinking: Annotated[int, Option(min=1, help="Tokens, twice in pairs. Paper: 4096.")] = 96,
    max_prompt: Annotated[int, Option(min=1, help="Tokens, twice in pairs. Paper: 4096.")] = 512,
    temperature: Annotated[float, Option(min=0, max=2, help="Of the thinking. Paper: 0.7 in RL.")] = 0.0,
    tokens_per_pass: TokensPerPass = 1024,
    threads: annotate.Threads = 64,
    gpus: annotate.Gpus = "0",
    seed: annotate.Seed = 0,
    examples: Annotated[int, Option(min=0, help="So many, drawn by the seed; 0: all. Paper: 164K.")] = 0,
    name: Annotated[str, Option(help="RUN/judges/NAME-sft. Default: direct or reasoning, variant.")] = "",
) -> None:
    options = {key: value for key, value in ctx.params.items() if key not in ("run", "name")}
    options["lora_modules"] = modules_of(options["preset"])
    if effort and (pairwise or not reasoning):
        fail("--effort is about the reasoning of pointwise judges; leave it out.")
    own = annotate.read_options(run / "annotations")["gold_effort"]
    options["effort"] = "" if effort == ("high" if own == "none" else own) else effort
    if pairwise:  # two outputs to read and to reason about
        options |= {"max_thinking": 2 * max_thinking, "max_prompt": 2 * max_prompt}
    check_context(model, options["max_prompt"] + options["max_thinking"], "--max-prompt and --max-thinking")
    kind = "reasoning" if reasoning else "direct"
    parts = kind, "pairwise" * pairwise, options["effort"], "rubrics" * rubrics
    folder = run / "judges" / f"{name or '-'.join(filter(None, parts))}-sft"
    training_rows(options, run)  # missing data end the command here
    annotate.record_config(folder, options)
    if not (folder / "judge.json").exists():
        on_ranks(sft, gpus, options, run, folder)
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
