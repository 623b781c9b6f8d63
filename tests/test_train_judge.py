"""Stage 2 without a live model: what a judge is asked and answers, packing, agreement, several ranks."""

import contextlib
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import peft
import pytest
import torch
import transformers
from conftest import annotate, sft, two_ranks
from hypothesis import given
from hypothesis import strategies as st
from stub import stub
from test_annotate import ASKED, hostile, slowly
from test_frozen import FROZEN, tiny_llama
from typer.testing import CliRunner


class Says:
    """An endpoint whose judge thinks `thinking`, and then gives the labels these `probabilities`."""

    model, url = "m", "u"

    def __init__(self, tokenizer: Any, thinking: str, probabilities: list[float]) -> None:
        self.tokenizer, self.thinking, self.probabilities = tokenizer, thinking, probabilities
        self.asked: list[list[int]] = []

    def sample(self, prompt: list[int], n: int, model: Any, **_: Any) -> list[Any]:
        self.asked.append(prompt)
        before, closed, _ = self.thinking.partition("</think>")
        return [annotate.Sample(annotate.encode(self.tokenizer, before + closed), [], before + closed, True)]

    def ask(self, prompt: list[int], request: Any, read: Any) -> Any:
        self.asked.append(request["prompt"])
        tokens = [f"token_id:{i}" for i in request["allowed_token_ids"]]
        top = {token: math.log(p) for token, p in zip(tokens, self.probabilities) if p}
        return read([{"logprobs": {"top_logprobs": [top]}}])


@given(output=hostile, thinking=hostile, label=st.integers(0, 9), closes=st.booleans())
@slowly
def test_the_place_of_the_label(tokenizer: Any, output: str, thinking: str, label: int, closes: bool) -> None:
    """Neither output nor thinking gives the label: only the token after the thinking's own end does."""
    chances = [0.9 if n == label else 0.1 / 9 for n in range(10)]
    thinking = thinking.encode(errors="replace").decode().replace("</think>", "") + "</think>" * closes
    endpoint = Says(tokenizer, thinking, chances)
    verdict = sft.ask_judge(sft.Judge(endpoint, tokenizer, None, reasoning=True), ASKED, output)
    assert verdict["label"] == (label if closes else None) and len(endpoint.asked) == 1 + closes
    assert (verdict["cause"] is None) == closes
    if closes:
        end = annotate.encode(tokenizer, "\n\n")
        assert endpoint.asked[1][-len(end) :] == end and endpoint.asked[1][: -len(end)] != endpoint.asked[0]
        assert verdict["expected"] == pytest.approx(0.9 * label + 0.1 / 9 * (45 - label))
    direct = Says(tokenizer, "", chances)
    verdict = sft.ask_judge(sft.Judge(direct, tokenizer, None, reasoning=False), ASKED, output)
    assert verdict["label"] == label and verdict["thinking_tokens"] == 0
    assert direct.asked == [sft.judge_prompt(tokenizer, annotate.judge_messages(ASKED, output), False)]


def test_expected_scores_and_ties(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels of 1/55, 2/55, … 10/55: the most probable is 9, the mean 6. Fault 12: 0.5 : 0.5 is a tie."""
    chances = [1.0005 * (n + 1) / 55 for n in range(10)]
    judge = sft.Judge(Says(tokenizer, "", chances), tokenizer, None, reasoning=False)
    verdict = sft.ask_judge(judge, ASKED, "Rain falls.")
    assert verdict["label"] == 9 and verdict["expected"] == pytest.approx(6)
    judge.pairwise = True
    for chances, expected in (([0.5, 0.5], 1.5), ([0.8, 0.2], 1.2), ([0.1, 0.9], 1.9)):
        judge.endpoint.probabilities = chances
        assert sft.ask_judge(judge, ASKED, "a", "b")["expected"] == pytest.approx(expected)
    judge.endpoint.probabilities = [0.5, 0.3]
    with pytest.raises(SystemExit):
        sft.ask_judge(judge, ASKED, "a", "b")
    assert "not constrained to the labels" in capsys.readouterr().err


@pytest.mark.parametrize("character", ["9", "\n", "\u202e"])
def test_a_megabyte_of_one_character_is_an_invalid_judgement(tokenizer: Any, character: str) -> None:
    """Found out in seconds, and without asking a server."""
    judge = sft.Judge(SimpleNamespace(), tokenizer, None, reasoning=False, max_prompt=4096)
    assert sft.ask_judge(judge, ASKED, character * 1_000_000)["cause"] == "prompt too long"


def test_a_refused_request_is_an_invalid_judgement_a_dead_server_is_none(tokenizer: Any) -> None:
    with stub() as url:
        refuses, down = (annotate.Endpoint(f"{url}/0/{m}/v1", "secret", "", 0) for m in ("refuse", "down"))
        for reasoning in (False, True):
            verdict = sft.ask_judge(sft.Judge(refuses, tokenizer, None, reasoning), ASKED, "Rain.")
            assert verdict["label"] is None and "content filter" in verdict["cause"]
            with pytest.raises(openai.InternalServerError):
                sft.ask_judge(sft.Judge(down, tokenizer, None, reasoning), ASKED, "Rain.")


@pytest.mark.parametrize("mode", ["html", "half", "empty", "short"])
def test_a_broken_answer_is_an_invalid_judgement(tokenizer: Any, mode: str) -> None:
    """Fault F1, of a judge of ours."""
    with stub() as url:
        endpoint = annotate.Endpoint(f"{url}/0/{mode}/v1", "secret", "m", 0)
        for reasoning in (False, True):
            verdict = sft.ask_judge(sft.Judge(endpoint, tokenizer, None, reasoning), ASKED, "Rain.")
            assert verdict["label"] is None and verdict["cause"].startswith("no answer: ")


def test_a_judge_trained_with_rubrics_is_asked_with_them(tokenizer: Any) -> None:
    endpoint, rubrics = Says(tokenizer, "", [0.1] * 10), {"Write.": "3: rain.\n6: </think>", "Other.": "9"}
    judge = sft.Judge(endpoint, tokenizer, None, False, rubrics=rubrics)
    sft.ask_judge(judge, "Write.", "Rain falls.")
    text = tokenizer.decode(endpoint.asked[0])
    assert "Instruction: Write.\n\nRubric:\n3: rain.\n6: < /think>\n\n[answer " in text
    with pytest.raises(SystemExit):
        sft.ask_judge(judge, "Never seen.", "x")


def test_the_options_of_a_judge(tmp_path: Path, monkeypatch: Any) -> None:
    """Fault R4: twice the room for two outputs. Examples by the seed; variants in the name, or another."""
    write_run(tmp_path)
    seen: list[Any] = []
    monkeypatch.setattr(sft, "on_ranks", lambda work, gpus, *arguments: seen.append(arguments))
    monkeypatch.setattr(sft, "choose_epoch", lambda options, run, folder: annotate.fail("far enough"))

    def asked_for(line: str) -> tuple[Any, Any]:
        CliRunner().invoke(sft.app, ["--run", str(tmp_path), *line.split()])
        return seen[-1][0], seen[-1][2].name

    options, name = asked_for("--no-reasoning --max-prompt 300 --examples 5 --seed 3")
    assert (name, options["max_prompt"], options["max_thinking"]) == ("direct-sft", 300, 96)
    assert sft.training_rows(options, tmp_path) == random.Random(3).sample(FROZEN["rows"], 5)
    options, name = asked_for("--reasoning --pairwise --max-prompt 300")
    assert (name, options["max_prompt"], options["max_thinking"]) == ("reasoning-pairwise-sft", 600, 192)
    options, name = asked_for("--reasoning --effort low --name mine")
    assert (name, options["effort"]) == ("mine-sft", "low")
    options, name = asked_for("--reasoning --effort low --rubrics")
    assert (name, options["effort"]) == ("reasoning-low-rubrics-sft", "low")
    assert [row["id"] for row in sft.training_rows(options, tmp_path)] == ["2", "4"]


def random_llama() -> Any:
    """In float64: small enough to compare gradients exactly."""
    return tiny_llama(97).double()


def random_pairs(seed: int, groups: int = 3, size: int = 4) -> list[Any]:
    """Prompts with a common beginning, `size` answers each; lengths vary, one prompt ends in the prefix."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(97) for _ in range(n)]

    rules = tokens(7)
    prompts = [rules] + [rules + tokens(rng.randint(1, 6)) for _ in range(groups - 1)]
    return [(prompt, tokens(rng.randint(1, 9))) for prompt in prompts for _ in range(size)]


def reference_logprobs(model: Any, prompt: list[int], answer: list[int], temperature: float = 1.0) -> Any:
    """One pair alone, by the model's own forward: its attention, mask, positions and head."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


@pytest.mark.parametrize("budget", [1, 20, 45, 10_000])
def test_packed_equals_unpacked(budget: int) -> None:
    """Log-probabilities and gradients are those of each pair alone, whatever shares its pass."""
    model, pairs = random_llama(), random_pairs(seed=1)
    expected = [reference_logprobs(model, p, a, 0.7) for p, a in pairs]
    weights = torch.linspace(-1, 1, sum(len(a) for _, a in pairs)).double().split([len(a) for _, a in pairs])
    sum((w * e).sum() for w, e in zip(weights, expected)).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    seen = []
    for packed in sft.pack(pairs, budget):
        members = list(packed.members)
        logprobs = sft.answer_logprobs(model, packed, 0.7).double()
        assert torch.allclose(logprobs, torch.cat([expected[i] for i in members]), atol=1e-5)
        (logprobs * torch.cat([weights[i] for i in members])).sum().backward()
        assert len(packed.ids_S) <= budget or len(members) == 1
        seen += members
    assert seen == list(range(len(pairs)))
    for parameter, gradient in zip(model.parameters(), gradients):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_a_shared_prompt_is_paid_for_once() -> None:
    pairs = [([1] * 50, [2] * 10) for _ in range(8)]
    assert [len(p.ids_S) for p in sft.pack(pairs, budget=1000)] == [50 + 8 * 9]
    assert [len(p.ids_S) for p in sft.pack(pairs, budget=100)] == [50 + 5 * 9, 50 + 3 * 9]
    groups = [([1] * 5 + [i] * 20, [2] * 3) for i in (3, 3, 4, 4)]
    assert [len(p.ids_S) for p in sft.pack(groups, budget=1000)] == [25 + 2 * 2] * 2  # in one: 5 + 4 * 22
    strangers = [([i] * 5, [2] * 3) for i in range(4)]
    assert sum(len(p.ids_S) for p in sft.pack(strangers, budget=1000)) == 4 * 7


@pytest.mark.parametrize("chunk", [1, 5, 2048])
def test_the_vocabulary_in_chunks(chunk: int, monkeypatch: Any) -> None:
    """Log-probabilities and gradients are those of one product, whatever the size of a chunk."""
    model, (packed,) = random_llama(), sft.pack(random_pairs(seed=1), 10_000)
    wanted = sft.answer_logprobs(model, packed, 0.7)
    (wanted * torch.linspace(-1, 1, len(wanted))).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(sft, "VOCABULARY_CHUNK", chunk)
    found = sft.answer_logprobs(model, packed, 0.7)
    assert len(found) == len(packed.targets_A) and torch.allclose(found, wanted, atol=1e-6)
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


def test_bfloat16_products_over_float32_masters(tmp_path: Path, monkeypatch: Any) -> None:
    """As on a GPU: the base in bfloat16; adapter, gradients and moments in float32; the same direction."""
    options, found = {**write_run(tmp_path), "checkpointing": True}, {}
    for precision in ("float32", "bfloat16"):
        monkeypatch.setattr(annotate, "precision", lambda name=precision: name)
        model, optimizer = sft.load_training(options, None)
        (packed,) = sft.pack(random_pairs(seed=1), 10_000)
        torch.manual_seed(0)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        logprobs_A = sft.answer_logprobs(model, packed)
        logprobs_A.mean().backward()
        gradients = [p.grad for p in sft.trainable(model)]
        assert logprobs_A.dtype == torch.float32 and {g.dtype for g in gradients} == {torch.float32}
        assert {p.dtype for p in sft.trainable(model)} == {torch.float32}
        assert model.get_base_model().lm_head.weight.dtype == getattr(torch, precision)
        found[precision] = torch.cat([g.flatten() for g in gradients])
        optimizer.step()
        moments = [x for s in optimizer.state.values() for x in s.values() if x.dim()]
        assert {x.dtype for x in moments} == {torch.float32}
    assert torch.cosine_similarity(found["float32"], found["bfloat16"], dim=0) > 0.99


def test_every_named_layer_is_adapted(tmp_path: Path, capsys: Any) -> None:
    """Fault F18: a class whose layers have other names is refused by name, not trained in part."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Phi3Config(**sizes, **tokens, num_attention_heads=4, num_key_value_heads=2)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    options = {**write_run(tmp_path / "run"), "model": str(tmp_path)}
    with pytest.raises(SystemExit):
        sft.load_training({**options, "lora_modules": sft.modules_of("node")}, None)
    message = capsys.readouterr().err
    assert all(name in message for name in ("q_proj", "up_proj", str(tmp_path))) and "o_proj" not in message
    sft.load_training({**options, "lora_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}, None)


def test_a_head_with_a_bias_is_trained_rightly() -> None:
    """Fault F19: Phi's lm_head has a bias; its log-probabilities at temperature 0.7 are the class's own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, num_attention_heads=4)).eval()
    torch.nn.init.normal_(base.lm_head.bias, std=3.0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    sft.check_forward(model, "some/model")
    prompt, answer = [n % 90 for n in range(40)], [n * 7 % 90 for n in range(20)]
    (packed,) = sft.pack([(prompt, answer)], 512)
    with torch.no_grad():
        own = reference_logprobs(base, prompt, answer, 0.7)
        assert torch.allclose(sft.answer_logprobs(model, packed, 0.7), own, atol=1e-4)


CLASSES = [
    *[("Llama", {}, True), ("Qwen2", {}, True), ("Qwen3", {"head_dim": 8}, True)],
    *[("Mistral", {"sliding_window": None}, True), ("Mistral", {"sliding_window": 16}, False)],
    *[("Granite", {"logits_scaling": 8.0}, False), ("Cohere", {}, False)],
    ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, False),
    ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}, False),
]


@pytest.mark.parametrize(("name", "more", "trained"), CLASSES)
def test_a_class_that_does_more_is_refused(name: str, more: Any, trained: bool, capsys: Any) -> None:
    """Fault 5: on 60 tokens the log-probabilities are the model's own, or it is refused by its name."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **heads, **more})
    base = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    if not trained:
        with pytest.raises(SystemExit):
            sft.check_forward(model, "some/model")
        assert "some/model" in capsys.readouterr().err
        return
    sft.check_forward(model, "some/model")
    prompt, answer = [n % 90 for n in range(40)], [n * 7 % 90 for n in range(20)]
    (packed,) = sft.pack([(prompt, answer)], 512)
    with torch.no_grad():
        own = reference_logprobs(base, prompt, answer)
        assert torch.allclose(sft.answer_logprobs(model, packed), own, atol=1e-4)


def judged(*triples: Any) -> list[Any]:
    return [dict(zip(("gold", "label", "expected", "thinking_tokens"), (*triple, 2))) for triple in triples]


def test_invalid_judgements_are_counted_not_scored() -> None:
    scores = sft.agreement(judged((0, 0, 0.0), (4, 4, 4.0), (9, 9, 9.0), (9, None, None)))
    assert (scores["alpha"], scores["exact"], scores["invalid"], scores["n"]) == (100, 100, 25, 4)
    assert scores["thinking_tokens"] == 2 and sft.describe(scores)
    none = sft.agreement(judged((9, None, None)))
    assert none["alpha"] is none["exact"] is None and "none" in sft.describe(none)


def test_an_epoch_is_chosen_by_what_rewards_a_policy() -> None:
    """Right digits from an almost flat distribution teach a policy nothing; invalid judgements cost."""

    def score(*expected: Any) -> dict[str, Any]:
        return sft.agreement(judged(*((g, e and g, e) for g, e in zip((1, 5, 9), expected))))

    flat, sharp, broken = score(4.4, 4.5, 4.6), score(2.0, 5.0, 8.0), score(2.0, None, 8.0)
    assert flat["alpha"] == sharp["alpha"] == 100 and flat["alpha_expected"] < sharp["alpha_expected"]
    chosen = [sft.selection_score(scores) for scores in (score(None, None, None), flat, broken, sharp)]
    assert chosen == sorted(chosen) and chosen[0] == -math.inf and len(set(chosen)) == 4
    wrong = {"alpha_expected": -30.0, "invalid": 0.0}
    assert sft.selection_score(wrong) > sft.selection_score({**wrong, "invalid": 90.0})


def test_pairs_are_scored_by_the_place_of_golds_choice() -> None:
    def score(counts: dict[Any, int]) -> dict[str, Any]:
        pairs = [pair for pair, n in counts.items() for _ in range(n)]
        return sft.agreement(judged(*((*pair, pair[1]) for pair in pairs)), True)

    got = score({(1, 1): 6, (1, 2): 2, (2, 2): 1, (2, 1): 3, (2, None): 1})
    assert (got["accuracy"], got["accuracy_1"], got["accuracy_2"]) == pytest.approx((700 / 12, 75, 25))
    assert got["says_1"] == pytest.approx(75) and got["invalid"] == pytest.approx(100 / 13)
    # One that always names the second, against one as often right that leans nowhere.
    biased, fair = score({(1, 2): 4, (2, 2): 8}), score({(1, 1): 3, (1, 2): 1, (2, 2): 5, (2, 1): 3})
    assert biased["accuracy"] == pytest.approx(fair["accuracy"])
    assert (sft.selection_score(biased), sft.selection_score(fair)) == pytest.approx((50, 68.75))
    assert sft.selection_score(score({})) == -math.inf
    tied = sft.agreement(judged((1, 1, 1.5), (2, 1, 1.5)), True)  # fault 12: half right, in either place
    assert tied["accuracy"] == tied["accuracy_1"] == tied["accuracy_2"] == 50


def write_run(run: Path) -> dict[str, Any]:
    """Annotations by hand, and a tiny model in run/model; options for training on them."""
    tiny_llama(49152).save_pretrained(run / "model")
    annotate.load_tokenizer(annotate.LAPTOP_MODEL).save_pretrained(run / "model")
    folder, rows = run / "annotations", FROZEN["rows"]
    annotate.write_json(folder / "config.json", {"options": {"preset": "laptop", "gold_effort": "none"}})
    files = {"labels": rows, "pairs": [{**row, "other": "b"} for row in rows]}
    files["labels-low"] = [row if row["id"] in "24" else {**row, "label": None} for row in rows]
    for name, records in files.items():
        annotate.write_jsonl(folder / f"{name}.jsonl", records)
        annotate.write_json(folder / f"{name}.json", {})
    return {**FROZEN["options"], "model": str(run / "model"), "seed": 0}


def test_what_was_left_out_stands_in_judge_json(tmp_path: Path, monkeypatch: Any) -> None:
    """Of 4 examples in each of two epochs one was too long."""
    options = {**write_run(tmp_path), "epochs": 2, "examples": 4, "temperature": 0.7, "rubrics": False}
    options |= {"threads": 1, "gpus": "0"}
    folder = tmp_path / "judges" / "direct-sft"
    annotate.write_jsonl(folder / "metrics.jsonl", [{"step": n, "left_out": n % 2} for n in range(4)])
    endpoint = SimpleNamespace(load_adapter=lambda *_: None, unload_adapter=lambda *_: None)
    monkeypatch.setattr(sft, "serve_adapters", lambda *_: contextlib.nullcontext(endpoint))
    monkeypatch.setattr(
        sft, "judge_row", lambda *_: {"gold": 1, "label": 1, "expected": 1.0, "thinking_tokens": 0}
    )
    sft.choose_epoch(options, tmp_path, folder)
    assert annotate.read_json(folder / "judge.json")["left_out"] == 0.25


def test_a_server_has_room_for_its_users_as_far_as_the_context_goes(monkeypatch: Any) -> None:
    """Prompt, thinking or output, and some; the greatest rank, and all modules."""
    monkeypatch.setattr(annotate, "serve", lambda *arguments, **lora: (*arguments, lora))
    judge = {"model": annotate.LAPTOP_MODEL, "max_prompt": 512, "max_thinking": 96, "lora_rank": 16}
    users = [{**judge, "lora_modules": ["q_proj"]}, {**judge, "max_thinking": 40, "lora_modules": ["k_proj"]}]
    *_, room, gpus, _, lora = sft.serve_adapters(users, Path("run"), "0", count=2)
    assert (room, gpus, lora) == (624, "0", {"rank": 16, "count": 2, "modules": ["k_proj", "q_proj"]})
    *_, room, _, _, _ = sft.serve_adapters([{**users[0], "max_prompt": 16_384}], Path("run"), "0")
    assert room == 8192


@two_ranks
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """Same losses and gradients; uneven shares (2 and 3 of 5); too long examples are left out."""
    options = {**write_run(tmp_path), "batch": 5, "epochs": 1, "max_thinking": 16}
    curves = []
    for gpus in ("0", "0,1"):
        sft.on_ranks(sft.fine_tune, gpus, options, tmp_path, tmp_path / gpus)
        metrics = annotate.read_jsonl(tmp_path / gpus / "metrics.jsonl")
        curves.append([[m[key] for key in ("loss", "grad_norm", "tokens", "left_out")] for m in metrics])
        assert (tmp_path / gpus / "epoch-1" / "adapter_model.safetensors").exists()
    assert len(curves[0]) == 3 and sum(left_out for *_, left_out in curves[0]) == 3
    for one, two in zip(*curves):
        assert one == pytest.approx(two, rel=1e-5)


def fail_on_the_second(seconds: float) -> None:
    if sft.rank_and_size()[0] == 1:
        if seconds:  # the first rank sees a closed connection before the parent sees the error
            torch.distributed.destroy_process_group()
            time.sleep(seconds)
        annotate.fail("on purpose")
    sft.over_ranks([0])  # would wait for ever


@two_ranks
@pytest.mark.parametrize("seconds", [0, 20])
def test_an_error_in_one_rank_ends_all(seconds: float) -> None:
    began = time.perf_counter()
    with pytest.raises(SystemExit) as end:
        sft.on_ranks(fail_on_the_second, "0,1", seconds)
    assert end.value.code == 1 and time.perf_counter() - began < 300  # not half an hour


@pytest.mark.parametrize("file", ["optimizer.pt", "adapter_model.safetensors"])
def test_a_damaged_state_is_named(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """F23: cut to 100 bytes, or to none; what to delete is said."""
    options = write_run(tmp_path)
    model, optimizer = sft.load_training(options, None)
    sft.save_state(tmp_path / "folder", 1, model, optimizer)
    _, state = sft.latest_state(tmp_path / "folder")
    for size in (100, 0):
        (state / file).write_bytes((state / file).read_bytes()[:size])
        with pytest.raises(SystemExit):
            sft.load_training(options, state)
        error = capsys.readouterr().err
        assert f"{state}: damaged" in error and f"Delete {tmp_path / 'folder'}" in error


def test_what_a_kill_in_the_middle_of_saving_leaves_does_no_harm(tmp_path: Path, monkeypatch: Any) -> None:
    """Fault R13: and nothing asks the hub when an adapter is saved."""
    model, optimizer = sft.load_training(write_run(tmp_path), None)
    hub = "peft.utils.save_and_load.check_file_exists_on_hf_hub"
    monkeypatch.setattr(hub, lambda *_: pytest.fail("the hub was asked"))
    model.peft_config["default"].base_model_name_or_path = "some/model"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        sft.save_state(tmp_path / "folder", 1, model, optimizer)
    assert sft.latest_state(tmp_path / "folder") == (0, None)
    for step in (1, 2):
        sft.save_state(tmp_path / "folder", step, model, optimizer)
        assert sft.latest_state(tmp_path / "folder")[0] == step
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["state-000002"]
