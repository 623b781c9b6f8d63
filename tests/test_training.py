"""Stages 2 and 3 without a server: packing, agreement, rewards, the GRPO loss, resumption."""

import json
import math
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED

annotate = import_module("01_annotate")
sft = import_module("02_train_judge")
rl = import_module("03_rl")


@pytest.fixture
def tiny() -> Any:
    return random_llama()


def random_llama() -> Any:
    """A random two-layer Llama in float64: small enough to compare gradients exactly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def random_pairs(seed: int, groups: int = 3, size: int = 4) -> list[Any]:
    """`groups` prompts with a common beginning, `size` answers each; lengths vary, one prompt ends in the prefix."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(97) for _ in range(n)]

    rules = tokens(7)
    prompts = [rules] + [rules + tokens(rng.randint(1, 6)) for _ in range(groups - 1)]
    return [(prompt, tokens(rng.randint(1, 9))) for prompt in prompts for _ in range(size)]


def reference_logprobs(model: Any, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    """One pair alone, with the model's own attention, mask and positions."""
    model.set_attn_implementation("eager")
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


# --- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 20, 45, 10_000])
@pytest.mark.parametrize("chunk", [3, 2048])
def test_packed_equals_unpacked(tiny: Any, budget: int, chunk: int) -> None:
    """Log-probabilities and gradients are those of each pair alone, whatever shares its pass."""
    pairs = random_pairs(seed=1)
    expected = [reference_logprobs(tiny, p, a, 0.7) for p, a in pairs]
    weights = torch.linspace(-1, 1, sum(len(a) for _, a in pairs), dtype=torch.float64)
    (torch.cat(expected) * weights).sum().backward()
    gradients = [p.grad.clone() for p in tiny.parameters()]
    tiny.zero_grad()

    offsets = [sum(len(a) for _, a in pairs[:i]) for i in range(len(pairs))]
    packs = list(sft.pack(pairs, budget))
    for packed in packs:
        logprobs = sft.answer_logprobs(tiny, packed, 0.7, chunk).double()
        wanted = torch.cat([expected[i] for i in dict.fromkeys(packed.owners_A)])
        assert torch.allclose(logprobs, wanted, atol=1e-5)
        mine = torch.cat([weights[offsets[i] : offsets[i] + len(pairs[i][1])] for i in dict.fromkeys(packed.owners_A)])
        (logprobs * mine).sum().backward()
    assert sorted(i for p in packs for i in set(p.owners_A)) == list(range(len(pairs)))
    for parameter, gradient in zip(tiny.parameters(), gradients):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_a_shared_prompt_is_paid_for_once() -> None:
    pairs = [([1] * 50, [2] * 10) for _ in range(8)]
    (packed,) = sft.pack(pairs, budget=1000)
    assert len(packed.ids_S) == 50 + 8 * 9
    assert [len(p.ids_S) for p in sft.pack(pairs, budget=100)] == [50 + 5 * 9, 50 + 3 * 9]
    strangers = [([i] * 5, [2] * 3) for i in range(4)]  # nothing to share: no reason to sit together
    assert sum(len(p.ids_S) for p in sft.pack(strangers, budget=1000)) == 4 * 7


# --- agreement -----------------------------------------------------------------------------------

# Krippendorff (2011), "Computing Krippendorff's alpha-reliability", example with missing data.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]  # fmt: skip


def test_alpha_published_value() -> None:
    assert sft.krippendorff_alpha(zip(*PUBLISHED)) == pytest.approx(0.849, abs=5e-4)


@pytest.mark.parametrize(
    ("raters", "alpha"),
    [
        ([[0, 3, 5, 7, 9], [0, 3, 5, 7, 9]], 1.0),
        ([[0, 3, 5, 7, 9, 9, 8, 2, 1, 6], [1, 3, 4, 7, 9, 8, 8, 2, 0, 6]], 0.9803921568627451),
        ([[0, 3, 5, 7, 9, 9, 8, 2, 1, 6], [9, 6, 4, 2, 0, 0, 1, 7, 8, 3]], -0.9),
    ],
)
def test_alpha_literal_cases(raters: list[list[int]], alpha: float) -> None:
    assert sft.krippendorff_alpha(zip(*raters)) == pytest.approx(alpha, abs=1e-12)


def test_no_alpha_without_variation() -> None:
    assert sft.krippendorff_alpha([(5, 5), (5, 5)]) is None and sft.krippendorff_alpha([]) is None


def test_alpha_reference_values() -> None:
    path = SHARED / "krippendorff_reference_values.json"
    if not path.exists():
        pytest.skip("shared data not here")
    cases = json.loads(path.read_text())["cases"]
    assert len(cases) > 5
    for name, case in cases.items():
        assert sft.krippendorff_alpha(zip(*case["data"])) == pytest.approx(case["interval"], abs=1e-9), name


def test_unusable_judgements_are_counted_not_scored() -> None:
    good = [{"gold": g, "label": g, "expected": float(g), "thinking_tokens": 2} for g in (0, 4, 9)]
    bad = [{"gold": 9, "label": None, "expected": None, "thinking_tokens": 10}]
    scores = sft.agreement(good + bad)
    assert (scores["alpha"], scores["exact"], scores["invalid"], scores["n"]) == (100, 100, 25, 4)
    assert scores["thinking_tokens"] == 4


# --- rewards and advantages ----------------------------------------------------------------------


def test_equation_1() -> None:
    assert rl.verifiable_reward(None, 5) == -1
    assert rl.verifiable_reward(5, 5) == 1 and rl.verifiable_reward(0, 9) == 0 and rl.verifiable_reward(9, 0) == 0
    assert rl.verifiable_reward(7, 4) == pytest.approx(1 - 9 / 81)


@pytest.mark.parametrize(
    ("text", "reasoning", "score"),
    [
        ("thought\n</think>\n\n7", True, 7), ("</think>\n\n0", True, 0), ("7", False, 7),
        ("thought\n</think>\n\n12", True, None), ("thought\n</think>\n7", True, None), ("thought 7", True, None),
        ("a</think>\n\n7</think>\n\n9", True, None), ("a</think>\n\n7 good", True, None), ("a</think>\n\n٧", True, None),
        (" 7", False, None), ("", False, None), ("-1", False, None),
    ],
)  # fmt: skip
def test_reading_a_whole_judgement(text: str, reasoning: bool, score: int | None) -> None:
    assert rl.read_score(text, reasoning) == score


def test_advantages() -> None:
    rewards = [1.0, 2.0, 6.0, 3.0]
    mean = torch.tensor(rewards).mean()
    expected = (torch.tensor(rewards) - mean) / torch.tensor(rewards).std(correction=0)
    assert rl.group_advantages(rewards, floor=0.1) == pytest.approx(expected.tolist())
    assert rl.group_advantages([5.0, 5.01], floor=0.1) == pytest.approx([-0.05, 0.05]), "the floor holds noise down"
    assert rl.group_advantages([4.0, 4.0], floor=0.0) == [0, 0]
    assert rl.group_advantages([1.0, None, 3.0], floor=0.1) == pytest.approx([-1, 0, 1]), "an unusable one does not count"
    assert rl.group_advantages([None, None], floor=0.1) == [0, 0]


# --- the loss ------------------------------------------------------------------------------------


def reference_loss(new: Any, old: Any, advantages: list[float], clip: tuple[float, float], beta: float, ref: Any) -> torch.Tensor:
    """Eq. 2 as it stands in the paper, token by token, for a list of rollouts."""
    total = torch.zeros((), dtype=torch.float64)
    for i, advantage in enumerate(advantages):
        inner = torch.zeros((), dtype=torch.float64)
        for t in range(len(new[i])):
            rho = torch.exp(new[i][t] - old[i][t])
            clipped = torch.clip(rho, 1 - clip[0], 1 + clip[1])
            term = rho * advantage if rho * advantage < clipped * advantage else clipped * advantage
            log_r = ref[i][t] - new[i][t]
            inner = inner + term - beta * (torch.exp(log_r) - log_r - 1)
        total = total + inner / len(new[i])
    return -total / len(advantages)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_gradient_equal_the_reference(beta: float) -> None:
    """Every sign of the advantage, ratios below, inside and above the clip range, rollouts of different lengths."""
    torch.manual_seed(0)
    lengths, advantages = [3, 5, 1, 4], [1.3, -0.7, 0.0, -2.0]
    old = [-torch.rand(n, dtype=torch.float64) for n in lengths]
    ref = [-torch.rand(n, dtype=torch.float64) for n in lengths]
    shifts = [torch.tensor([-0.5, 0.0, 0.5, 0.1, -0.1], dtype=torch.float64)[:n] for n in lengths]
    clip = (0.2, 0.3)

    new = [(o + s).requires_grad_() for o, s in zip(old, shifts)]
    expected = reference_loss(new, old, advantages, clip, beta, ref)
    expected.backward()

    flat = torch.cat([o + s for o, s in zip(old, shifts)]).requires_grad_()
    advantages_A = torch.cat([torch.full((n,), a, dtype=torch.float64) for n, a in zip(lengths, advantages)])
    weights_A = torch.cat([torch.full((n,), 1 / (n * len(lengths)), dtype=torch.float64) for n in lengths])
    loss = rl.grpo_loss(flat, torch.cat(old), advantages_A, weights_A, clip, beta, torch.cat(ref))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(flat.grad, torch.cat([n.grad for n in new]), atol=1e-12)


@pytest.mark.parametrize(
    ("shift", "advantage", "moves"),
    [(0.5, 1, False), (0.5, -1, True), (-0.5, 1, True), (-0.5, -1, False), (0.25, 1, True), (-0.25, -1, False), (-0.2, -1, True)],
)
def test_where_the_clip_stops_the_gradient(shift: float, advantage: float, moves: bool) -> None:
    """log(1.3) = 0.262 and log(0.8) = -0.223: the clip is not symmetric (0.2 below, 0.3 above)."""
    new = torch.tensor([shift], requires_grad=True)
    rl.grpo_loss(new, torch.zeros(1), torch.tensor([float(advantage)]), torch.ones(1), (0.2, 0.3)).backward()
    assert (new.grad.item() != 0) == moves
    if moves:
        assert new.grad.item() == pytest.approx(-advantage * math.exp(shift))


# --- a whole optimiser step ----------------------------------------------------------------------

OPTIONS = {"temperature": 0.7, "clip_low": 0.2, "clip_high": 0.3, "beta": 0.0}


def rollouts(seed: int) -> list[list[Any]]:
    """Three groups of four; one group flat, one rollout without reward."""
    rng = random.Random(seed)
    pairs = random_pairs(seed)
    groups = []
    for start in range(0, len(pairs), 4):
        rewards = [5.0] * 4 if start == 4 else [rng.uniform(0, 9) for _ in range(3)] + [None if start else 1.0]
        advantages = rl.group_advantages(rewards, 0.1)
        groups.append([
            rl.Rollout({"id": "x"}, p, annotate.Sample(a, [math.log(rng.uniform(0.004, 0.04)) for _ in a], "", True), r, {}, adv)
            for (p, a), r, adv in zip(pairs[start : start + 4], rewards, advantages)
        ])  # fmt: skip
    return groups


class Peft(torch.nn.Module):
    """What `update` needs of a peft model: its base, and a switch that is not used here."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def get_base_model(self) -> Any:
        return self.base


def gradients_after(model: Any, groups: Any, **options: Any) -> list[torch.Tensor]:
    """The gradient that `update` hands to the optimiser."""
    seen: list[torch.Tensor] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.extend(p.grad.clone() for p in model.parameters())

    rl.update(Peft(model), Spy(model.parameters(), lr=0.1), groups, {**OPTIONS, **options})
    return seen


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_update_is_the_gradient_of_equation_2(tiny: Any, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the reference on unpacked sequences; so also: no dependence on micro-batches and packing."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(1.0))
    groups = rollouts(seed=3)
    rewarded = [r for group in groups for r in group if r.reward is not None]
    assert len(rewarded) == 11 and any(r.advantage == 0 for r in rewarded)
    new = [reference_logprobs(tiny, r.prompt, r.sample.tokens_T, 0.7) for r in rewarded]
    old = [torch.tensor(r.sample.logprobs_T, dtype=torch.float64) for r in rewarded]
    reference_loss(new, old, [r.advantage for r in rewarded], (0.2, 0.3), 0.0, old).backward()
    expected = [p.grad.clone() for p in tiny.parameters()]
    tiny.zero_grad()
    got = gradients_after(tiny, groups, tokens_per_pass=budget)
    scale = max(g.abs().max().item() for g in expected)
    assert scale > 1e-3
    for mine, theirs in zip(got, expected):
        assert torch.allclose(mine, theirs, atol=1e-5 * scale)


def test_prompts_of_a_step_depend_on_the_step_alone() -> None:
    rows = [{"id": i} for i in range(10)]
    steps = [rl.prompts_of_step(rows, s, 4, seed=0) for s in range(10)]
    seen = [row["id"] for step in steps for row in step]
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10)), "each prompt once in a pass"
    assert seen[:10] != seen[10:20]


def test_learning_rate_schedule() -> None:
    """The same as transformers' linear schedule with warm-up, shifted by the step it would waste at rate 0."""
    rates = [sft.learning_rate(s, 100, 1.0) for s in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[-1] == pytest.approx(1 / 97)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert sft.learning_rate(0, 1, 1.0) == 1.0


def test_saved_state_continues_exactly(tmp_path: Path) -> None:
    """Three steps, or one step, a restart and two steps: the same weights."""

    def steps(model: Any, optimizer: Any, numbers: Any) -> None:
        for number in numbers:
            pairs = random_pairs(seed=number)
            for packed in sft.pack([([t + 1 for t in p], [t + 1 for t in a]) for p, a in pairs], 200):
                (-sft.answer_logprobs(model, packed).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh(adapter: Path | None) -> tuple[Any, Any]:
        model = sft.load_model(annotate.LAPTOP_MODEL, adapter, 8, ["q_proj", "v_proj"], seed=1)
        return model, sft.make_optimizer(model, 1e-3)

    model, optimizer = fresh(None)
    steps(model, optimizer, [0])
    sft.save_state(tmp_path, 1, model, optimizer)
    steps(model, optimizer, [1, 2])
    (tmp_path / "state-000002.part").mkdir()  # what a kill in the middle of saving leaves

    step, state = sft.latest_state(tmp_path)
    assert step == 1
    again, optimizer = fresh(state)
    sft.restore_optimizer(optimizer, again, state)
    steps(again, optimizer, [1, 2])
    for one, two in zip(sft.trainable(model), sft.trainable(again)):
        assert torch.allclose(one, two, atol=1e-7)
    assert any(p.abs().max() > 0 for n, p in again.named_parameters() if "lora_B" in n)


# --- evaluation ----------------------------------------------------------------------------------


def test_bootstrap_interval() -> None:
    evaluate = import_module("04_evaluate")
    values = [random.Random(0).gauss(5, 2) for _ in range(400)]
    low, high = evaluate.bootstrap(values)
    mean, error = sum(values) / 400, 1.96 * torch.tensor(values).std().item() / 20
    assert low == pytest.approx(mean - error, abs=0.03) and high == pytest.approx(mean + error, abs=0.03)
    assert evaluate.bootstrap(values) == (low, high)


def test_lift_is_paired_and_skips_the_unusable() -> None:
    attacks = import_module("05_attack_analysis")
    got = attacks.lifts({"a": 9.0, "b": 5.0, "c": None, "d": 1.0}, {"a": 4.0, "b": 4.0, "c": 3.0, "d": None})
    assert (got["lift"], got["base"], got["final"], got["n"], got["unusable"]) == (3.0, 4.0, 7.0, 2, 2)


def test_an_epoch_is_chosen_by_what_rewards_a_policy() -> None:
    """Right digits from an almost flat distribution teach a policy nothing; unusable judgements cost."""

    def judged(expected: list[float | None]) -> dict[str, float | None]:
        rows = [{"gold": g, "label": None if e is None else g, "expected": e, "thinking_tokens": 0} for g, e in zip((1, 5, 9), expected)]
        return sft.agreement(rows)

    flat, sharp, broken = judged([4.4, 4.5, 4.6]), judged([2.0, 5.0, 8.0]), judged([2.0, None, 8.0])
    assert flat["alpha"] == sharp["alpha"] == 100 and flat["alpha_expected"] < sharp["alpha_expected"]
    assert sft.merit(flat) < sft.merit(broken) < sft.merit(sharp)
    assert sft.merit(judged([None] * 3)) == -math.inf
    # In pairs: one that always names the second, against one as often right that leans nowhere.
    biased, fair = [(1, 2)] * 4 + [(2, 2)] * 8, [(1, 1)] * 3 + [(1, 2)] + [(2, 2)] * 5 + [(2, 1)] * 3
    one, other = (sft.pair_agreement([{"gold": g, "label": said, "thinking_tokens": 0} for g, said in pairs]) for pairs in (biased, fair))
    assert one["accuracy"] == pytest.approx(other["accuracy"]) and sft.merit(one) == pytest.approx(50) and sft.merit(other) == pytest.approx(68.75)
    assert sft.merit({"accuracy": 90.0, "accuracy_1": 90.0, "accuracy_2": None, "invalid": 10.0}) == pytest.approx(81.0)
    assert sft.merit(sft.pair_agreement([])) == -math.inf


@pytest.mark.parametrize("shape", ["smollm2-135m", "qwen3-4b", "qwen3-8b"])
def test_cost_formula_counts_every_weight(shape: str) -> None:
    """Against the library's own model of that shape, without memory: weights to 0.1 % (the norms), adapter exactly."""
    import bench_sft
    import peft
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, inner, layers, heads, kv, width, vocabulary, tied = bench_sft.SHAPES[shape]
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=width, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        base = Qwen3ForCausalLM(config)
        parts = bench_sft.memory(shape, 1)
        assert parts["weights"] == pytest.approx(2 * sum(p.numel() for p in base.parameters()), rel=1e-3)
        model = peft.get_peft_model(base, peft.LoraConfig(r=bench_sft.RANK, target_modules=list(sft.LINEAR)))
    assert parts["adapter"] == 16 * sum(p.numel() for p in sft.trainable(model))
