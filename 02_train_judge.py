"""Stage 2: distil the gold judge into a small LoRA judge, with or without reasoning.

    --no-reasoning   instruction + output -> digit                                  (SFT, LoRA)
    --reasoning      instruction + output -> the gold judge's reasoning, then digit  (SFT, LoRA)

What goes in:   RUN/annotations/labels.jsonl
What comes out: RUN/judges/direct-sft/ or RUN/judges/reasoning-sft/ (--effort, --rubrics: reasoning-low-rubrics-sft/)
                epoch-1/, epoch-2/ …   a PEFT adapter after each epoch
                validation-1.jsonl …   its judgements of the validation outputs
                metrics.jsonl          loss and learning rate of each optimiser step
                judge.json             the epoch chosen, and its agreement with the gold judge

Simpler than the paper, and why:
 1. LoRA instead of full fine-tuning, at about ten times the learning rate: one adapter is a small
    file that a running vLLM server loads, so one server plays every judge and the policy.
 2. No padding and no data loader: the examples of a batch are packed behind their common prefix
    (the judge's rules), which is computed once. `pack` is the one idea of this file.

    python 02_train_judge.py --preset laptop --run runs/demo --no-reasoning
    python 02_train_judge.py --preset laptop --run runs/demo --reasoning
"""

from __future__ import annotations

import math
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import typer
from tqdm import tqdm

annotate = import_module("01_annotate")

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    import torch

# ---------------------------------------------------------------------------------------------
# Packing: several (prompt, answer) pairs in one forward pass, their common prefix only once.
# ---------------------------------------------------------------------------------------------

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its answer


@dataclass
class Pack:
    """One forward pass over a shared prefix and the branches behind it; S tokens, A answer tokens.

    A token sees the prefix and its own branch up to itself, and its position counts as if the
    branch stood alone behind the prefix. The hidden state at `sources_A[i]` predicts the answer
    token `targets_A[i]`, which belongs to the pair number `owners_A[i]` of the packed list.
    """

    ids_S: list[int]
    positions_S: list[int]
    branches: list[int]  # where each begins in S; the first is the prefix
    sources_A: list[int]
    targets_A: list[int]
    owners_A: list[int]


def shared_prefix(prompts: Sequence[list[int]]) -> int:
    """The number of tokens with which all `prompts` begin."""
    first, last = min(prompts), max(prompts)  # in dictionary order: what these share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


def pack(pairs: Sequence[Pair], budget: int) -> Iterator[Pack]:
    """Pack `pairs`, in order, into forward passes of at most `budget` tokens (one pair may exceed it).

    A pair joins the pack before it only where that saves tokens against starting a new one.
    """
    bin_: list[int] = []
    for index, (prompt, answer) in enumerate(pairs):
        size = pack_size([pairs[i] for i in [*bin_, index]])
        if bin_ and (size > budget or size > pack_size([pairs[i] for i in bin_]) + len(prompt) + len(answer) - 1):
            yield build_pack(pairs, bin_)
            bin_ = []
        bin_.append(index)
    if bin_:
        yield build_pack(pairs, bin_)


def pack_size(pairs: Sequence[Pair]) -> int:
    prefix = shared_prefix([prompt for prompt, _ in pairs])
    return prefix + sum(len(prompt) - prefix + len(answer) - 1 for prompt, answer in pairs)


def build_pack(pairs: Sequence[Pair], members: Sequence[int]) -> Pack:
    prefix = shared_prefix([pairs[i][0] for i in members])
    result = Pack(pairs[members[0]][0][:prefix], list(range(prefix)), [0], [], [], [])
    for index in members:
        prompt, answer = pairs[index]
        start = len(result.ids_S)
        tokens = [*prompt[prefix:], *answer[:-1]]  # nothing follows the last token, so it is not fed
        result.ids_S += tokens
        result.positions_S += range(prefix, prefix + len(tokens))
        result.branches.append(start)
        first = start + len(prompt) - prefix  # where the answer begins; its predictor is one before
        last_of_prompt = first - 1 if len(prompt) > prefix else prefix - 1
        result.sources_A += [last_of_prompt, *range(first, first + len(answer) - 1)]
        result.targets_A += answer
        result.owners_A += [index] * len(answer)
    return result


def answer_logprobs(model: Any, packed: Pack, temperature: float = 1.0, chunk: int = 2048) -> torch.Tensor:
    """log p(target) of every answer token, shape [A], float32, with gradient.

    Only answer positions go through the vocabulary, `chunk` at a time and recomputed in the
    backward pass, so that memory does not grow with answer tokens x vocabulary.
    """
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers import AttentionInterface

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = base.device
    AttentionInterface.register("branches", attend_by_branch)
    base.set_attn_implementation("branches")
    hidden_SD = base.model(
        input_ids=torch.tensor([packed.ids_S], device=device),
        position_ids=torch.tensor([packed.positions_S], device=device),
        use_cache=False,
        branches=packed.branches,
    ).last_hidden_state[0]

    def logprobs(hidden_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        logits_CV = base.lm_head(hidden_CD).float() / temperature
        return logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(1)

    hidden_AD = hidden_SD[torch.tensor(packed.sources_A, device=device)]
    targets_A = torch.tensor(packed.targets_A, device=device)
    if len(targets_A) <= chunk:
        return logprobs(hidden_AD, targets_A)
    parts = zip(hidden_AD.split(chunk), targets_A.split(chunk))
    return torch.cat([checkpoint(logprobs, hidden, targets, use_reentrant=False) for hidden, targets in parts])


def attend_by_branch(module: Any, query_1HSK: Any, key_1GSK: Any, value_1GSK: Any, mask: Any, branches: Sequence[int] | None = None, **more: Any) -> Any:
    """Attention in a `Pack`, for transformers' AttentionInterface: the prefix, then each branch behind it.

    `branches`: where each begins, after 0 for the prefix. One mask over the pack would do the same,
    but pay for every branch looking at every other; None is ordinary attention.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if branches is None:
        return sdpa_attention_forward(module, query_1HSK, key_1GSK, value_1GSK, mask, **more)
    prefix, seen = branches[1], []
    for start, end in pairwise([*branches, query_1HSK.shape[2]]):
        if start == end:  # no prefix, or an answer of one token right behind it
            continue
        keys, values, sees = key_1GSK[:, :, start:end], value_1GSK[:, :, start:end], None  # None: causal
        if start:
            keys, values = torch.cat([key_1GSK[:, :, :prefix], keys], 2), torch.cat([value_1GSK[:, :, :prefix], values], 2)
            sees = torch.ones(end - start, prefix + end - start, dtype=torch.bool, device=keys.device).tril(prefix)[None, None]
        seen.append(sdpa_attention_forward(module, query_1HSK[:, :, start:end], keys, values, sees, **more)[0])
    return torch.cat(seen, 1), None


# ---------------------------------------------------------------------------------------------
# Several GPUs: one process (a rank) on each, with the same weights. Every rank works on its share of
# a batch; one sum over the gradients of the adapter, and all take the same optimiser step.
# ---------------------------------------------------------------------------------------------


def on_ranks(work: Callable[..., None], gpus: str, *arguments: Any) -> None:
    """Call `work(*arguments)` as one rank on each of `gpus`; on a CPU their number counts.

    A single rank runs in this process. Several are started by torch, and end with this process
    even by kill -9; `work` and `arguments` travel by pickle. An error in one ends them all.
    """
    import torch

    devices = gpus.split(",")
    if len(devices) == 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(gpus))
        work(*arguments)
        torch.cuda.empty_cache()  # a server may want this memory next
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        torch.multiprocessing.spawn(enter_rank, (devices, port, os.getpid(), work, arguments), nprocs=len(devices))
    except torch.multiprocessing.ProcessExitedException as error:
        raise SystemExit(error.exit_code) from None


def enter_rank(rank: int, devices: list[str], port: int, parent: int, work: Callable[..., None], arguments: Any) -> None:
    import torch

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(devices[rank]))
        backend = "cpu:gloo,cuda:nccl"
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(devices)))
        backend = "gloo"
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group(backend, init_method=address, rank=rank, world_size=len(devices))
    work(*arguments)
    torch.distributed.destroy_process_group()


def world() -> tuple[int, int]:
    """(rank, number of ranks) of this process; (0, 1) where there is only one."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    if world()[1] > 1:
        import torch.distributed as dist

        dist.barrier()


def over_ranks(values: Sequence[float], how: str = "SUM") -> list[float]:
    """The sums (or with `how` MAX, the maxima) of `values` over the ranks."""
    import torch
    import torch.distributed as dist

    if world()[1] == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)  # on the CPU: gloo
    dist.all_reduce(numbers, getattr(dist.ReduceOp, how))
    return numbers.tolist()


def sum_gradients(model: Any) -> None:
    """Give every rank the sum of all ranks' gradients. A rank without a share brings zeros."""
    import torch

    if world()[1] == 1:
        return
    parameters = trainable(model)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)


# ---------------------------------------------------------------------------------------------
# The model, and training that can stop anywhere.
# ---------------------------------------------------------------------------------------------


def load_model(name: str, adapter: Path | None, rank: int, modules: Sequence[str], seed: int = 0) -> Any:
    """The model with a trainable LoRA adapter: the one in `adapter`, or a new one of `rank`.

    The base stays in bfloat16 on a GPU (float32 on a CPU); peft keeps the adapter in float32.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.bfloat16 if gpu else torch.float32, attn_implementation="sdpa", use_safetensors=True
    ).to("cuda" if gpu else "cpu")
    if gpu:  # trade a third more compute for not keeping activations
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if adapter:
        model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    else:
        model = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules)))
    # Train mode switches gradient checkpointing on; neither these models nor our LoRA use dropout.
    return model.train()


def check_adapter(folder: Path, model: str, rank: int) -> Path:
    """`folder`, a PEFT adapter for `model` of `rank`; another base or rank ends the command."""
    config = annotate.read_json(folder / "adapter_config.json", ["base_model_name_or_path", "r"])
    if (config["base_model_name_or_path"], config["r"]) != (model, rank):
        annotate.fail(
            f"{folder}/adapter_config.json: an adapter of rank {config['r']} for {config['base_model_name_or_path']}, "
            f"but rank {rank} for {model} is needed. Restore the folder, or train it again."
        )
    return annotate.need(folder / "adapter_model.safetensors", "the stage that made this folder").parent


def trainable(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizer(model: Any, lr: float) -> Any:
    import torch

    return torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0)


def save_state(folder: Path, step: int, model: Any, optimizer: Any) -> None:
    """Write all that `step` finished steps leave behind, in one rename; drop older states."""
    import torch
    from safetensors.torch import save_file

    target = folder / f"state-{step:06d}"
    scratch = target.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    moments = {
        f"{index}.{name}": value.contiguous()
        for index, parameter in enumerate(trainable(model))
        for name, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }
    save_file(moments, scratch / "optimizer.safetensors")
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    for old in folder.glob("state-*"):
        if old != target:
            shutil.rmtree(old)


def latest_state(folder: Path) -> tuple[int, Path | None]:
    """(finished steps, folder of the newest whole state), or (0, None)."""
    states = sorted(p for p in folder.glob("state-*") if p.suffix != ".part")
    return (int(states[-1].name.removeprefix("state-")), states[-1]) if states else (0, None)


def restore_optimizer(optimizer: Any, model: Any, state: Path) -> None:
    from safetensors.torch import load_file

    moments = load_file(state / "optimizer.safetensors")
    for index, parameter in enumerate(trainable(model)):
        names = [key.split(".", 1)[1] for key in moments if key.split(".", 1)[0] == str(index)]
        # AdamW keeps its step count on the CPU, the moments beside the parameter.
        optimizer.state[parameter] = {
            n: moments[f"{index}.{n}"].to("cpu" if n == "step" else parameter.device) for n in names
        }


def rewind_metrics(path: Path, steps: int) -> None:
    """Keep the metrics of the first `steps` steps: later ones will be made again."""
    records = annotate.read_jsonl(path, ["step"])
    if any(record["step"] >= steps for record in records):
        annotate.write_jsonl(path, [record for record in records if record["step"] < steps])


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up over the first 3 % of the steps, then linear decay to 0 (as the paper's SFT)."""
    ramp = max(1, round(warmup * steps))
    return peak * min((step + 1) / ramp, (steps - step) / max(1, steps - ramp))


def sft(options: dict[str, Any], folder: Path, pairs: Sequence[Pair]) -> None:
    """Minimise the mean cross-entropy of the answer tokens of `pairs`; one adapter an epoch. Runs on every rank."""
    import torch

    batches = math.ceil(len(pairs) / options["batch"])
    steps = options["epochs"] * batches
    first, state = latest_state(folder)
    if first == steps:
        return
    model = load_model(options["model"], state, options["lora_rank"], options["lora_modules"], options["seed"])
    optimizer = make_optimizer(model, options["lr"])
    rank, ranks = world()
    if state:
        restore_optimizer(optimizer, model, state)
    if rank == 0:
        print(f"going on after step {first} of {steps}" if state else f"{steps} steps")
        rewind_metrics(folder / "metrics.jsonl", first)

    for step in tqdm(range(first, steps), initial=first, total=steps, desc="fine-tuning", disable=rank > 0):
        began = time.perf_counter()
        epoch, place = divmod(step, batches)
        order = random.Random(f"{options['seed']} {epoch}").sample(range(len(pairs)), len(pairs))
        # Sorted by prompt, so that neighbours share as long a prefix as they can.
        batch = sorted(pairs[i] for i in order[place * options["batch"] : (place + 1) * options["batch"]])
        tokens = sum(len(answer) for _, answer in batch)
        loss = 0.0
        # Neighbours stay together, so that a rank's share still has a common prefix.
        share = batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]
        for packed in pack(share, options["tokens_per_pass"]):
            part = -answer_logprobs(model, packed).sum() / tokens
            part.backward()
            loss += part.item()
        sum_gradients(model)
        (loss,) = over_ranks([loss])
        norm = torch.nn.utils.clip_grad_norm_(trainable(model), 1.0).item()
        if not math.isfinite(norm):
            annotate.fail(f"{folder}: the gradient of step {step} is not finite. Lower --lr ({options['lr']}).")
        lr = learning_rate(step, steps, options["lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        if rank:
            continue
        record = {"step": step, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": norm, "answer_tokens": tokens}
        annotate.append_jsonl(folder / "metrics.jsonl", {**record, "seconds": time.perf_counter() - began})
        if (step + 1) % batches == 0:
            model.save_pretrained(folder / f"epoch-{epoch + 1}")
        if (step + 1) % batches == 0 or (step + 1) % options["save_every"] == 0:
            save_state(folder, step + 1, model, optimizer)


# ---------------------------------------------------------------------------------------------
# Agreement with the gold judge.
# ---------------------------------------------------------------------------------------------


def krippendorff_alpha(units: Iterable[Sequence[float | None]]) -> float | None:
    """Krippendorff's alpha with the interval metric (Krippendorff 2011, "Computing alpha").

    `units`: the ratings of each rated thing, None where a rater gave none. 1 is perfect agreement,
    0 what chance gives, below 0 systematic disagreement; None where all ratings are the same.
    The sum of (a - b)^2 over ordered pairs of a list is 2 (n * sum of squares - square of sum).
    """
    rated = [[x for x in unit if x is not None] for unit in units]
    rated = [unit for unit in rated if len(unit) > 1]

    def disagreement(values: Sequence[float]) -> float:
        return 2 * (len(values) * sum(x * x for x in values) - sum(values) ** 2)

    everything = [x for unit in rated for x in unit]
    n = len(everything)
    expected = disagreement(everything) / (n * (n - 1)) if n else 0.0
    if expected == 0:
        return None
    observed = sum(disagreement(unit) / (len(unit) - 1) for unit in rated) / n
    return 1 - observed / expected


def agreement(judgements: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Agreement of judgements (records with gold, label, expected) with gold, in per cent; None where there is none.

    Unusable judgements are left out of alpha and counted in `invalid`.
    """
    usable = [j for j in judgements if j["label"] is not None]

    def alpha(key: str) -> float | None:
        value = krippendorff_alpha([(j["gold"], j[key]) for j in usable])
        return None if value is None else 100 * value

    return {
        "alpha": alpha("label"),
        "alpha_expected": alpha("expected"),
        "exact": 100 * sum(j["label"] == j["gold"] for j in usable) / len(usable) if usable else None,
        "invalid": 100 * (1 - len(usable) / max(1, len(judgements))),
        "thinking_tokens": sum(j["thinking_tokens"] for j in judgements) / max(1, len(judgements)),
        "n": len(judgements),
    }


def pair_agreement(judgements: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """How often pairwise judgements name gold's choice, in per cent; also by the place of that choice.

    A judge without position bias is as often right where gold chose the first as where it chose the
    second output. Unusable judgements are left out and counted in `invalid`.
    """
    usable = [j for j in judgements if j["label"] is not None]

    def right(rows: Sequence[dict[str, Any]]) -> float | None:
        return 100 * sum(j["label"] == j["gold"] for j in rows) / len(rows) if rows else None

    return {
        "accuracy": right(usable),
        "accuracy_1": right([j for j in usable if j["gold"] == 1]),
        "accuracy_2": right([j for j in usable if j["gold"] == 2]),
        "says_1": 100 * sum(j["label"] == 1 for j in usable) / max(1, len(usable)),
        "invalid": 100 * (1 - len(usable) / max(1, len(judgements))),
        "thinking_tokens": sum(j["thinking_tokens"] for j in judgements) / max(1, len(judgements)),
        "n": len(judgements),
    }


def describe(scores: dict[str, float | None]) -> str:
    s = {key: "none" if value is None else f"{value:.1f}" for key, value in scores.items()}
    if "accuracy" in scores:
        text = f"accuracy {s['accuracy']} % (gold chose the first: {s['accuracy_1']} %, the second: {s['accuracy_2']} %)"
    else:
        text = f"alpha {s['alpha']} (expected score {s['alpha_expected']}), exact {s['exact']} %"
    return f"{text}, invalid {s['invalid']} %, {s['thinking_tokens']} thinking tokens, n = {scores['n']}"


def judge_rows(path: Path, judge: Any, rows: Iterable[dict[str, Any]], label: str, threads: int) -> list[dict[str, Any]]:
    """The judgements of annotated `rows` by `judge`, kept in `path`: {id, gold, label, expected, …}."""

    def work(row: dict[str, Any]) -> dict[str, Any]:
        verdict = asdict(annotate.ask_judge(judge, row["instruction"], row["output"], row.get("other")))
        return {"gold": row["label"], **verdict, "probabilities": [round(p, 4) for p in verdict["probabilities"]]}

    return annotate.complete(path, {row["id"]: row for row in rows}, work, label, threads)


def labelled(run: Path, split: str, reasoning: bool = False, effort: str = "", pairwise: bool = False) -> list[dict[str, Any]]:
    """The annotated outputs (or pairs) of `split` that carry a gold label (and a reasoning, if asked for).

    With `effort`, another than that of labels.jsonl: those reasoned about at that effort, with the same label.
    """
    folder = run / "annotations"
    name, flag = ("pairs", " --pairs") if pairwise else (f"labels-{effort}", f" --efforts {effort}") if effort else ("labels", "")
    annotate.need(folder / f"{name}.json", f"01_annotate.py --run {run}{flag}")
    rows = annotate.scan_jsonl(folder / f"{name}.jsonl", ["id", "split", "instruction", "output", "label", "reasoning"])
    return [r for _, r in rows if r["split"] == split and r["label"] is not None and (r["reasoning"] or not reasoning)]


# ---------------------------------------------------------------------------------------------
# The command.
# ---------------------------------------------------------------------------------------------

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

PRESETS = {
    "model": (annotate.LAPTOP_MODEL, "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B"),
    "lora_rank": (16, 32, 64),
    "lora_modules": (ATTENTION, LINEAR, LINEAR),
    "lr": (2e-3, 1e-4, 1e-4),
    "batch": (8, 128, 128),
    "epochs": (2, 2, 2),
    "max_thinking": (96, 4096, 4096),
    "temperature": (0.0, 0.7, 0.7),
    "max_prompt": (512, 4096, 4096),
    "tokens_per_pass": (512, 16_384, 16_384),
    "save_every": (10, 50, 50),
    "threads": (64, 256, 1024),
    "gpus": ("0", "0", "0,1,2,3,4,5,6,7"),
    "seed": (0, 0, 0),
}
# A label is one token of supervision an example, a reasoning fifty: without it, more passes.
DIRECT = {**PRESETS, "epochs": (4, 1, 1), "lr": (2e-3, 1e-4, 1e-4)}


def option(name: str, text: str) -> Any:
    """The option's help, with the presets of both kinds of judge where they differ."""
    other = "" if DIRECT[name] == PRESETS[name] else f" (--no-reasoning: laptop {DIRECT[name][0]}, gpu and node {DIRECT[name][1]})"
    return annotate.option(PRESETS, name, text + other)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=(__doc__ or "").split("\n\n")[0])
def main(
    run: Path = annotate.RUN,
    preset: annotate.Preset | None = annotate.PRESET,  # type: ignore[name-defined]
    reasoning: bool = typer.Option(..., "--reasoning/--no-reasoning", help="Learn the gold judge's reasoning, or its label alone."),
    effort: str = typer.Option("", help="Effort of the reasoning to learn: low, medium or high, as labelled by 01 (--efforts). Default: that of the labels."),
    pairwise: bool = typer.Option(False, "--pairwise", help="Learn which of two outputs is better, from the pairs of 01 (--pairs)."),
    rubrics: bool = typer.Option(False, "--rubrics", help="Show the judge gold's rubric of each instruction, in training and wherever it judges."),
    model: str | None = option("model", "The judge's base model. Paper: Qwen3-1.7B to 14B."),
    lora_rank: int | None = option("lora_rank", "Rank of the adapter: 1, 8, 16, 32, 64, 128, 256 (as vLLM serves). Paper: full fine-tuning."),
    lora_modules: list[str] | None = option("lora_modules", "Linear layers that get an adapter."),
    lr: float | None = option("lr", "Peak learning rate. Paper: 1e-5, full fine-tuning."),
    batch: int | None = option("batch", "Examples of one optimiser step. Paper: 128."),
    epochs: int | None = option("epochs", "Passes over the data; the best one on validation is kept. Paper: 1-2 direct, 2-3 reasoning."),
    max_thinking: int | None = option("max_thinking", "Longest thinking, in tokens; longer is unusable. Paper: 4096."),
    temperature: float | None = option("temperature", "Temperature of the judge's thinking, here and wherever it judges. Paper: 0.7 in RL."),
    max_prompt: int | None = option("max_prompt", "Longest judge prompt, in tokens; longer examples are left out. Paper: 4096."),
    tokens_per_pass: int | None = option("tokens_per_pass", "Tokens of one forward pass: memory, not the result, depends on it."),
    save_every: int | None = option("save_every", "Optimiser steps between two saved states."),
    threads: int | None = option("threads", "Judge calls in flight at once."),
    gpus: str | None = option("gpus", "GPUs that train, one rank on each, and then serve for validation."),
    seed: int | None = option("seed", "Seed of the adapter and of the order of examples."),
    examples: int = typer.Option(0, min=0, help="Train on this many of the examples, drawn by the seed. 0: on all. Paper: about 164K."),
    name: str = typer.Option("", help="Name of the judge's folder, RUN/judges/NAME-sft. Default: direct or reasoning, with effort and rubrics."),
    plan: bool = annotate.PLAN,
    tokens_per_second: float | None = annotate.RATE,
) -> None:  # fmt: skip
    options = annotate.settle(PRESETS if reasoning else DIRECT, run, preset, {**locals(), "lora_modules": lora_modules or None})
    options["reasoning"] = reasoning
    if effort and not reasoning:
        annotate.fail("--effort is about the reasoning; leave it out or say --reasoning.")
    begun = (run / "annotations" / "config.json").exists()
    if begun and effort == annotate.reference_effort(annotate.read_options(run / "annotations")):
        effort = ""
    if pairwise and effort:
        annotate.fail("--pairwise has the labels' own effort only; leave out --effort.")
    if pairwise and max_thinking is None:
        options["max_thinking"] *= 2  # two outputs are reasoned about
    variant = {"effort": effort, "rubrics": rubrics, "pairwise": pairwise, "examples": examples}
    options |= {key: value for key, value in variant.items() if value}
    if plan:
        return annotate.show_plan(plan_training(options, run), options["preset"], tokens_per_second)
    kind = "-".join(word for word in ("reasoning" if reasoning else "direct", "pairwise" * pairwise, effort, "rubrics" * rubrics) if word)
    train_judge(options, run, run / "judges" / f"{name or kind}-sft")


def plan_training(options: dict[str, Any], run: Path) -> list[Any]:
    """The tokens to train on and the validation calls of one judge, from the beginning."""
    facts = annotate.expect(run, options["preset"])
    prompt = facts["judge_prompt"] + (annotate.ASSUMED["rubric"] if options.get("rubrics") else 0)
    answer = 1 + (facts["reasoning"] if options["reasoning"] else 0)
    if options.get("effort"):
        answer = 1 + annotate.ASSUMED_REASONING[options["effort"]]
    return [
        ("examples to train on, all epochs", options["epochs"] * (options.get("examples") or facts["judge_train"]), 0, prompt + answer),
        ("validation after each epoch", options["epochs"] * facts["judge_validation"], prompt, answer),
    ]


def train_judge(options: dict[str, Any], run: Path, folder: Path) -> None:
    pairwise = options.get("pairwise", False)
    train = labelled(run, "judge_train", options["reasoning"], options.get("effort", ""), pairwise)
    validation = labelled(run, "judge_validation", pairwise=pairwise)
    rubrics = annotate.read_rubrics(run) if options.get("rubrics") else None
    wanted = options.get("examples") or len(train)
    if not train or not validation or wanted > len(train):
        annotate.fail(f"{run}/annotations: {len(train)} examples to train on ({wanted} asked for), {len(validation)} to validate on.")
    train = random.Random(options["seed"]).sample(train, wanted) if wanted < len(train) else train
    annotate.record_config(folder, options)
    if not (folder / "judge.json").exists():
        annotate.need_gpus(options)
        tokenizer = annotate.load_tokenizer(options["model"])
        pairs = [
            (
                annotate.judge_prompt(tokenizer, annotate.row_messages(row, rubrics), options["reasoning"]),
                annotate.judge_answer(tokenizer, row["label"], row["reasoning"] if options["reasoning"] else None),
            )
            for row in train
        ]
        fitting = [p for p in pairs if len(p[0]) <= options["max_prompt"] and len(p[1]) <= options["max_thinking"]]
        print(f"{len(fitting)} examples; {len(pairs) - len(fitting)} left out, longer than the limits")
        if not fitting:
            annotate.fail(f"{run}/annotations/labels.jsonl: no example fits --max-prompt {options['max_prompt']}. Raise it.")
        on_ranks(sft, options["gpus"], options, folder, fitting)
        choose_epoch(options, run, folder, tokenizer, validation)
    judge = annotate.read_json(folder / "judge.json", ["epoch", "validation"])
    print(f"{folder}: epoch {judge['epoch']}. On validation: {describe(judge['validation'])}")


# What a later stage must know of a judge, beside where its adapter is.
DESCRIBES = ("model", "reasoning", "lora_rank", "lora_modules", "max_thinking", "temperature", "max_prompt")
VARIANTS = ("effort", "rubrics", "pairwise")  # the same, where a judge has them


def merit(scores: dict[str, Any]) -> float:
    """What an epoch is chosen by: alpha of the expected score, times the share of usable judgements.

    The expected score, because it rewards the policies. The most likely digit can agree with gold while
    the distribution behind it is almost flat: such a judge rewards every rollout alike. In pairs: accuracy,
    the mean of both places of gold's choice, so that a judge that always names the second has 50.
    """
    values = [scores[key] for key in ("alpha_expected", "accuracy_1", "accuracy_2") if scores.get(key) is not None]
    return fmean(values) * (1 - scores["invalid"] / 100) if values else -math.inf


def choose_epoch(
    options: dict[str, Any], run: Path, folder: Path, tokenizer: Any, rows: Sequence[dict[str, Any]]
) -> None:
    """Judge the validation outputs with each epoch's adapter; the one of most `merit` becomes the judge."""
    scores = {}
    with serve_judges(options, run) as endpoint:
        for epoch in range(1, options["epochs"] + 1):
            endpoint.load_adapter(f"epoch-{epoch}", folder / f"epoch-{epoch}")
            judge = open_judge(endpoint, tokenizer, f"epoch-{epoch}", options, run)
            verdicts = judge_rows(folder / f"validation-{epoch}.jsonl", judge, rows, f"epoch {epoch}", options["threads"])
            scores[epoch] = (pair_agreement if options.get("pairwise") else agreement)(verdicts)
            print(f"epoch {epoch}: {describe(scores[epoch])}")
            endpoint.unload_adapter(f"epoch-{epoch}")

    best = max(scores, key=lambda epoch: merit(scores[epoch]))
    kept = {key: options[key] for key in (*DESCRIBES, *VARIANTS) if key in options}
    annotate.write_json(folder / "judge.json", {**kept, "epoch": best, "adapter": f"epoch-{best}", "validation": scores[best]})


def open_judge(endpoint: Any, tokenizer: Any, adapter: str | None, judge: dict[str, Any], run: Path) -> Any:
    """The judge described by `judge` (a judge.json, or the options it came from) behind `endpoint`.

    One that was trained with rubrics gets those of `run`.
    """
    rubrics = annotate.read_rubrics(run) if judge.get("rubrics") else None
    limits = judge["max_thinking"], judge["max_prompt"]
    return annotate.Judge(
        endpoint, tokenizer, adapter, judge["reasoning"], *limits, judge["temperature"], rubrics, judge.get("pairwise", False)
    )


def serve_judges(options: dict[str, Any], run: Path, **more: Any) -> Any:
    """A server for the base model of `options` and LoRA adapters of its rank."""
    return annotate.serve(
        options["model"], run / "logs", max_len=options["max_prompt"] + options["max_thinking"] + 16,
        lora_rank=options["lora_rank"], lora_modules=options["lora_modules"], gpus=options["gpus"], **more,
    )  # fmt: skip


if __name__ == "__main__":
    annotate.start(app)
