"""Does it run here, and what will it cost me? Without weights and without network.

    python tests/cost.py --preset gpu                 what is here, measured; then hours, price, disk of all
    python tests/cost.py --preset node --no-measure   the formulas only

Measured here, in ten minutes at most: driver and memory; token/s and peak memory of stage 2's training step
and of stage 3's update, by their own code, on random weights of the preset's true shapes. On a CPU these run
on short texts, and of models over 1B with one layer and with two, to which the others are added: an estimate.

All else is computed, by the formulas below from the assumptions that are printed beside the results. No stage
as a whole has run on a GPU.

Memory of one rank that trains: T tokens in a forward pass, A of them answers, b bytes a weight (bfloat16: 2).
  weights      b for each
  adapter      16 a weight of LoRA: itself, its gradient, Adam's two moments, in float32
  checkpoints  b T D for each layer: its input, from which the backward pass computes the rest again
  layer        b T (inputs + outputs of the linear maps), of one layer; without checkpoints, of each
  answers      4 A D: their hidden states in float32
  vocabulary   12 V for each of at most 2,048 answers: logits, softmax, gradient; computed again in chunks
Time to train: for each token 2 FLOPs a weight of the layers forward, 2 in the backward pass (frozen weights
have no gradient), 2 to compute the layer again; attention 16 D for each of the T^2 / 2 pairs and layer; the
vocabulary 6 D V an answer. Divided by MFU x the card's peak.
Time to write: a step of a server writes one token of each sequence, and reads the weights and all caches at
a third of the card's bandwidth; it takes FLOOR at least. Prompts are read at MFU x peak, 2 FLOPs a weight.
"""

import inspect
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
annotate, sft, rl = (import_module(name) for name in ("01_annotate", "02_train_judge", "03_rl"))

# Of config.json: hidden, intermediate, layers, heads, key-value heads, head width, vocabulary, tied weights.
SHAPES = {
    "SmolLM2-135M-Instruct": (576, 1536, 30, 9, 3, 64, 49152, True),
    "Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, 128, 151936, False),
}
# Bytes of the weights, weights a token uses, bytes of cache a token (half of the layers see 128 tokens only).
GOLD = {"gpt-oss-20b": (13.8e9, 3.6e9, 24_576), "gpt-oss-120b": (65e9, 5.1e9, 36_864)}
CHUNK = 2048  # answers whose logits are held at once


@dataclass(frozen=True)
class Card:
    memory: float  # bytes
    bandwidth: float  # bytes a second
    peak: float  # FLOP/s in bfloat16, dense
    dollars: float  # an hour, rented


CARDS = {  # RTX 4090; H100 SXM. Prices are guesses at what renting costs.
    "gpu-24GB": Card(24e9, 1.008e12, 165e12, 0.40),
    "gpu-80GB": Card(80e9, 3.35e12, 989e12, 2.50),
    "node": Card(80e9, 3.35e12, 989e12, 2.50),
}
MFU = 0.35  # a goal, not measured; the step before this one reached 0.09 to 0.20 on an H100
FLOOR = 0.008  # seconds of a server's step: vLLM's own work for a small model
RESERVED = 2e9  # bytes of a card for CUDA, graphs and activations
# Tokens: what a judge is shown, what gold and judges think (paper: 982 at high effort), a policy's prompt and
# its output.
SHOWN, THINKING, PROMPT, OUTPUT = 1000, 982, 250, 500


def linears(shape: str) -> list[tuple[int, int]]:
    """(in, out) of the seven linear maps of a layer."""
    hidden, inner, _, heads, kv, width, _, _ = SHAPES[shape]
    attention = [(hidden, heads * width), (hidden, kv * width), (hidden, kv * width), (heads * width, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def counts(shape: str) -> tuple[int, int, int]:
    """(weights of the layers, of the vocabulary in all, bytes of cache a token in bfloat16)."""
    hidden, _, layers, _, kv, width, vocabulary, tied = SHAPES[shape]
    embeddings = vocabulary * hidden * (1 if tied else 2)
    return layers * sum(a * b for a, b in linears(shape)), embeddings, 4 * layers * kv * width


def adapter(shape: str, rank: int) -> int:
    """Weights of LoRA on all linear maps."""
    return SHAPES[shape][2] * rank * sum(a + b for a, b in linears(shape))


def memory(
    shape: str, tokens: int, answers: int, rank: int, weight: int = 2, checkpoints: bool = True
) -> dict[str, float]:
    """Bytes by part, for one rank that trains."""
    hidden, layers, vocabulary = (SHAPES[shape][i] for i in (0, 2, 6))
    matrices, embeddings, _ = counts(shape)
    kept = 1 if checkpoints else layers
    return {
        "weights": weight * (matrices + embeddings),
        "adapter": 16 * adapter(shape, rank),
        "checkpoints": weight * layers * tokens * hidden * checkpoints,
        "layer": weight * kept * tokens * sum(a + b for a, b in linears(shape)),
        "answers": 4 * answers * hidden,
        "vocabulary": 12 * min(answers, CHUNK) * vocabulary,
    }


def training_flops(shape: str, prompt: float, answers: float, group: int = 1) -> float:
    """Of `group` answers of `answers` tokens each behind one prompt."""
    hidden, _, layers, heads, _, width, vocabulary, _ = SHAPES[shape]
    tokens, pairs = prompt + group * answers, prompt**2 / 2 + group * answers * (prompt + answers / 2)
    attention = 16 * layers * heads * width * pairs
    return 6 * counts(shape)[0] * tokens + attention + 6 * group * answers * hidden * vocabulary


@dataclass(frozen=True)
class Server:
    """A replica: bytes of its weights, weights a token uses, bytes of cache a token, its cards."""

    weights: float
    active: float
    cache: float
    card: Card
    cards: int = 1
    share: float = 0.9
    sequences: int = 256

    def seconds(self, calls: float, prompt: float, written: float) -> float:
        """For `calls` that read `prompt` tokens and write `written`."""
        context = prompt + written / 2
        room = self.share * self.cards * self.card.memory - self.weights - self.cards * RESERVED
        at_once = max(1, min(self.sequences, calls, room / self.cache / context))
        read = (self.weights + at_once * context * self.cache) / (self.cards * self.card.bandwidth / 3)
        reading = calls * prompt * 2 * self.active / (MFU * self.card.peak * self.cards)
        return reading + calls * written * max(read, FLOOR) / at_once


def serve(model: str, card: Card, share: float = 0.9) -> Server:
    matrices, embeddings, cache = counts(name := model.split("/")[-1])
    return Server(
        2 * (matrices + embeddings), matrices + SHAPES[name][0] * SHAPES[name][6], cache, card, 1, share
    )


def options(command: Any, table: dict[str, Any], preset: str) -> dict[str, Any]:
    """What a command is run with: the defaults of its signature, then the preset's."""
    defaults = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    return defaults | table.get(preset, {})


def all_options(preset: str) -> tuple[Any, Any, Any, Any]:
    """Of 01, 02, 03 judge and 03 policy."""
    first = options(annotate.main, annotate.PRESETS, preset), options(sft.main, sft.PRESETS, preset)
    grpo = (rl.train_judge, rl.JUDGE_PRESETS), (rl.train_policy, rl.POLICY_PRESETS)
    return *first, *(options(*pair, preset) for pair in grpo)


def number(gpus: str) -> int:
    return gpus.count(",") + 1


def stages(preset: str, card: Card, large: bool) -> list[tuple[str, float]]:
    """(stage, hours). `large`: the card has room for more than 32 gold sequences at once."""
    one, two, judge, policy = all_options(preset)
    apart = policy["judge_gpus"] != policy["policy_gpus"]
    share = 0.9 if apart else 0.45
    judge_shape, policy_shape = (o["model"].split("/")[-1] for o in (two, policy))
    weights, active, cache = GOLD[one["gold"].split("/")[-1]]
    each = one["gold_gpus_each"]
    gold = Server(weights, active, cache, card, each, 0.9, 256 if large else 32)
    replicas = number(one["gpus"]) / each
    judging, writing = serve(two["model"], card, share), serve(policy["model"], card, share)
    examples, compute = one["judge_train"] * one["outputs"], MFU * card.peak
    labels = sum(one[split] for split in annotate.JUDGE_SPLITS) * one["outputs"]
    found = [("01 labels, high effort", gold.seconds(labels, SHOWN, THINKING) / replicas)]
    for name, answers in (("direct", 2), ("reasoning", THINKING)):
        seconds = two["epochs"] * examples * training_flops(judge_shape, SHOWN, answers) / compute
        found.append((f"02 {name}, {two['epochs']} epochs", seconds / number(two["gpus"])))
    rollouts, trainers = judge["prompts"] * judge["group"], number(judge["train_gpus"])
    sample = judging.seconds(rollouts, SHOWN, THINKING) / number(judge["judge_gpus"])
    train = (
        judge["prompts"] * training_flops(judge_shape, SHOWN, THINKING, judge["group"]) / compute / trainers
    )
    found.append((f"03 judge, {judge['steps']} steps", judge["steps"] * (sample + train)))
    rollouts, trainers = policy["prompts"] * policy["group"], number(policy["train_gpus"])
    write = writing.seconds(rollouts, PROMPT, OUTPUT) / number(policy["policy_gpus"])
    train = (
        policy["prompts"] * training_flops(policy_shape, PROMPT, OUTPUT, policy["group"]) / compute / trainers
    )
    for name, answers in (("direct", 1), ("reasoning", THINKING)):
        judged = judging.seconds(rollouts, SHOWN, answers) / number(policy["judge_gpus"])
        collect = max(write, judged) if apart else write + judged
        found.append(
            (f"03 policy against {name}, {policy['steps']} steps", policy["steps"] * (collect + train))
        )
    checkpoints = policy["steps"] // policy["checkpoint_every"]
    outputs = one["policy_test"] * (1 + 2 * (1 + (checkpoints - 1) / 2))  # two policies; half in between
    seconds = gold.seconds(outputs, SHOWN, THINKING) / replicas + 2 * judging.seconds(
        outputs, SHOWN, THINKING
    )
    found.append(("04 gold, both policies", seconds))
    return [(name, seconds / 3600) for name, seconds in found]


# --- Measured here ----------------------------------------------------------------------------------


def random_model(shape: str, layers: int) -> Any:
    """What `from_pretrained` is replaced by: the shape with random weights."""
    import transformers as hf

    hidden, inner, _, heads, kv, width, vocabulary, tied = SHAPES[shape]
    kind = {"Qwen3": hf.Qwen3Config, "Qwen2": hf.Qwen2Config}.get(shape[:5], hf.LlamaConfig)
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "head_dim": width}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv}
    config = kind(**sizes, tie_word_embeddings=tied, max_position_embeddings=32768)

    def build(name: str, dtype: Any, attn_implementation: str, **_: Any) -> Any:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            how = {"dtype": dtype, "attn_implementation": attn_implementation}
            return hf.AutoModelForCausalLM.from_config(config, **how)

    return build


def held(peak: bool = False) -> float:
    """Bytes that this process holds, or has held at most since it was last asked for what it holds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


def measure(
    o: Any, layers: int, prompt: int, answers: int, grpo: bool, checkpoints: bool = False, passes: int = 2
) -> tuple[float, float]:
    """(seconds of an optimiser step, peak bytes) on one batch: a pack of examples, or a group of rollouts.

    `checkpoints`: on a CPU too, where stage 2 keeps everything.
    """
    import peft  # noqa: F401  # what an import takes belongs to no term
    from transformers import AutoModelForCausalLM

    shape, rng, before = o["model"].split("/")[-1], random.Random(0), held()
    o = {
        **o,
        "lora_modules": sft.modules_of(o.get("preset") or "gpu"),
        "checkpointing": checkpoints or torch.cuda.is_available(),
    }
    with patch.object(AutoModelForCausalLM, "from_pretrained", random_model(shape, layers)):
        model, optimizer = sft.load_training(o, None)
    size = o["group"] if grpo else max(1, o["tokens_per_pass"] // (prompt + answers))
    seconds = []

    def tokens(count: int) -> list[int]:
        return [rng.randrange(100, SHAPES[shape][6]) for _ in range(count)]

    for _ in range(passes + 1):
        began, shown = time.perf_counter(), tokens(prompt)
        if grpo:
            samples = [annotate.Sample(tokens(answers), [-11.9] * answers, "", True) for _ in range(size)]
            group = [
                rl.Rollout({}, shown, s, 1.0, (-1.0) ** n, {}, s.logprobs_T) for n, s in enumerate(samples)
            ]
            rl.update(model, optimizer, [group], o)
        else:
            pairs = [(tokens(prompt), tokens(answers)) for _ in range(size)]
            for packed in sft.pack(pairs, o["tokens_per_pass"]):
                (-sft.answer_logprobs(model, packed).mean()).backward()
            sft.optimizer_step(model, optimizer, o["lr"])
        held(peak=True)  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]), held(peak=True) - before


def measured(name: str, o: Any, prompt: int, answers: int, grpo: bool) -> None:
    """Print token/s and peak memory of a step, beside the formula's; on a CPU from one layer and two."""
    shape, gpu = o["model"].split("/")[-1], torch.cuda.is_available()
    layers, whole = SHAPES[shape][2], gpu or counts(shape)[0] < 1e9
    size = o["group"] if grpo else max(1, o["tokens_per_pass"] // (prompt + answers))
    tokens = prompt + size * answers if grpo else size * (prompt + answers)
    if whole:
        seconds, peak = measure(o, layers, prompt, answers, grpo)
    else:
        _, *runs = [measure(o, few, prompt, answers, grpo) for few in (1, 1, 2)]  # the first finds its memory
        seconds, peak = (one + (layers - 1) * (two - one) for one, two in zip(*runs))
    formula = memory(shape, tokens, size * answers, o["lora_rank"], 2 if gpu else 4, checkpoints=gpu)
    flops = (
        training_flops(shape, prompt, answers, size)
        if grpo
        else size * training_flops(shape, prompt, answers)
    )
    how = "measured" if whole else f"estimated from 1 and 2 of {layers} layers"
    rate = f"{tokens / seconds:,.0f} token/s, {flops / seconds / 1e12:.2f} TFLOP/s"
    peaks = f"peak {peak / 1e9:.1f} GB (formula {sum(formula.values()) / 1e9:.1f})"
    print(f"  {name}: {tokens} tokens, {how}: {rate}, {peaks}", flush=True)


def show_machine() -> None:
    query = "--query-gpu=name,driver_version,memory.total,memory.free --format=csv,noheader"
    try:
        found = subprocess.run(["nvidia-smi", *query.split()], capture_output=True, text=True).stdout.strip()
    except OSError:
        found = "no nvidia-smi"
    seen = f"torch {torch.__version__} sees {torch.cuda.device_count()}, for CUDA {torch.version.cuda}"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"GPU: {found}; {seen}")
    print(f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} used; {total / 1e9:.0f} GB of memory")


def show_memory(preset: str) -> None:
    """A rank that trains, then a server of its model beside it on a card of 24 and of 80 GB."""
    _, two, _, policy = all_options(preset)
    print(
        "\nGB of one rank that trains, by formula, in bfloat16 with checkpoints; all tokens may be answers:"
    )
    for stage, o in {"02 and 03 judge": two, "03 policy": policy}.items():
        shape, tokens = o["model"].split("/")[-1], o["tokens_per_pass"]
        parts = memory(shape, tokens, tokens, o["lora_rank"])
        text = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        print(f"  {stage}, {shape}, {tokens} tokens a pass: {sum(parts.values()) / 1e9:.1f} ({text})")
        matrices, embeddings, cache = counts(shape)
        for size in (24e9, 80e9):
            tokens = (0.45 * size - 2 * (matrices + embeddings) - RESERVED) / cache
            room = f"cache for {max(0, tokens):,.0f} tokens of {cache // 1024} KB"
            left = (0.55 * size - sum(parts.values())) / 1e9
            print(f"    {size / 1e9:.0f} GB: a server at 0.45 has {room}; left beside both {left:.1f} GB")


ANCHORS = {  # public figures: sequences at once, tokens read and written by each, tokens a second in all
    "gpt-oss-20b, one H100 (docs.gpustack.ai, ShareGPT)": (
        "gpt-oss-20b",
        "gpu-80GB",
        1,
        256,
        215,
        198,
        16701,
    ),
    "gpt-oss-120b, two H100 (docs.gpustack.ai, ShareGPT)": (
        "gpt-oss-120b",
        "gpu-80GB",
        2,
        256,
        215,
        198,
        16042,
    ),
    "gpt-oss-20b, RTX 5090 x 0.56 (poorpaul.dev, llama.cpp)": ("gpt-oss-20b", "gpu-24GB", 1, 32, 0, 500, 835),
}


def show_hours(preset: str) -> None:
    """Hours and dollars of each stage, on each kind of card that the preset is meant for."""
    names = ["node"] if preset == "node" else ["gpu-24GB", "gpu-80GB"]
    policy, cards = all_options(preset)[3], 8 if preset == "node" else 1
    tables = [stages(preset, CARDS[name], name != "gpu-24GB") for name in names]
    sums = [sum(hours for _, hours in table) for table in tables]
    dollars = [hours * cards * CARDS[name].dollars for name, hours in zip(names, sums)]
    print(f"\nHours by formula (MFU {MFU} is a goal; none of this was measured on a GPU):")
    for title, values in [("", names), *((rows[0][0], [h for _, h in rows]) for rows in zip(*tables))]:
        print(f"  {title:42}", *(f"{v:>10}" if isinstance(v, str) else f"{v:10.1f}" for v in values))
    print(f"  {'all':42}", *(f"{hours:10.1f}" for hours in sums))
    print(f"  {'dollars':42}", *(f"{price:10.0f}" for price in dollars))
    print("Dollars an hour of a card, guessed:", *(f"{name} {CARDS[name].dollars}" for name in names))
    print(f"Tokens: a judge is shown {SHOWN}, gold and judges think {THINKING};", end=" ")
    print(f"a policy is asked {PROMPT} and writes {OUTPUT}.")
    print(f"A step of the policy's training has {policy['prompts']} x {policy['group']} rollouts.", end=" ")
    print("On one card sampling, judging and training take turns;")
    print(
        "on a node judging runs beside sampling. 24 GB: 32 gold answers at once; 80 GB: 256 (--gold-flags '')"
    )
    print("Stage 05 asks for some thousand judgements more: minutes to an hour.")
    print("The formula for writing against public figures, tokens read and written a second:")
    for name, (model, card, several, at_once, prompt, written, public) in ANCHORS.items():
        server = Server(*GOLD[model], CARDS[card], several, 0.9, at_once)
        rate = 1000 * (prompt + written) / server.seconds(1000, prompt, written)
        print(f"  {name}: {public:,}; formula {rate:,.0f}")
    print(
        "What a run should show when: finding 1 (direct judge: own up, gold down) within 300 steps; finding 2"
    )
    print(
        "(reasoning judge: gold rises) at 700 to 1,000 steps in the paper, whose steps have 1,024 rollouts."
    )
    print(
        f"The preset trains for {policy['steps']} steps; for the first finding alone, 03 policy --steps 300."
    )


def show_disk(preset: str) -> None:
    one, two, judge, policy = all_options(preset)
    judge_shape, policy_shape = (o["model"].split("/")[-1] for o in (two, policy))
    models = {shape: 2 * sum(counts(shape)[:2]) for shape in (judge_shape, policy_shape)}
    models[one["gold"]] = GOLD[one["gold"].split("/")[-1]][0]
    print(
        "\nDownloads, GB: " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in models.items()), end=""
    )
    print("; guessed: torch, vLLM and CUDA 10, the preference data 1")
    kept = {"02": (judge_shape, two["lora_rank"], 2 * two["epochs"])}
    kept["03 judge"] = judge_shape, two["lora_rank"], judge["steps"] // judge["checkpoint_every"]
    kept["03 policy"] = policy_shape, policy["lora_rank"], policy["steps"] // policy["checkpoint_every"]
    for stage, (shape, rank, number_kept) in kept.items():
        size = 4 * adapter(shape, rank) / 1e9
        print(f"  {stage}: {number_kept} adapters of {size:.2f} GB; a state of {3 * size:.2f} GB, replaced")


def main(
    preset: Annotated[str, typer.Option(help="laptop, gpu or node.")] = "gpu",
    here: Annotated[bool, typer.Option("--measure/--no-measure", help="Run training steps here.")] = True,
) -> None:
    if here and "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # else a CPU's allocator keeps what is freed
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    show_machine()
    _, two, judge, policy = all_options(preset)
    if here:
        gpu = torch.cuda.is_available()
        short = preset == "laptop" or not gpu
        shown, thinking, asked, output = (128, 64, 64, 40) if short else (SHOWN, THINKING, PROMPT, OUTPUT)
        print(f"\nTraining here, random weights of {preset}'s shapes, {'short' if short else 'full'} texts:")
        for o in (two, judge, policy):
            o["preset"], o["tokens_per_pass"] = preset, 512 if short else o["tokens_per_pass"]
        judge |= {"model": two["model"], "lora_rank": two["lora_rank"], "beta": 0.0}
        measured("SFT, reasoning", two, shown, thinking, grpo=False)
        measured("GRPO of the judge", judge, shown, thinking, grpo=True)
        measured("GRPO of the policy", policy, asked, output, grpo=True)
    if preset == "laptop":
        print("\nThe whole of `make demo` was measured: results/README.md. It downloads one small model.")
        return
    show_memory(preset)
    show_hours(preset)
    show_disk(preset)


if __name__ == "__main__":
    typer.run(main)
