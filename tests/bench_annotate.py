"""How near stage 1's labelling comes to the bare engine: the same prompts, settings and output lengths in one run.

ours    `label_outputs` as 01 runs it: JSONL in, a chat request for each record to our vLLM server, JSONL out
engine  vLLM's own offline engine, `LLM.chat` on the whole list at once, in a process of its own

Both stay up; repetitions alternate, each with prompts that neither has seen. Outputs have a fixed length (the stop
token is ignored), so that both write the same number of tokens. The figures are medians of tokens written per second.

    python tests/bench_annotate.py --json OUT.json                                   # laptop: about ten minutes on two cores
    python tests/bench_annotate.py --model Qwen/Qwen3-1.7B --requests 2048 --tokens 512 --seqs 256 --json OUT.json     # one GPU
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parent.parent))
annotate = import_module("01_annotate")

MAX_LEN = 2048  # tokens of prompt and output


class FixedLength(annotate.Endpoint):  # type: ignore[name-defined]
    """Our endpoint, its answers made as long as they are allowed to be, and taken for a label."""

    def chat(self, messages: list[dict[str, str]], **settings: Any) -> tuple[str, str, bool]:
        text, _, finished = super().chat(messages, **settings, extra_body={"ignore_eos": True})
        assert not finished, "an answer ended before its length"
        return "7", text, True


def examples(number: int, words: int, seed: int) -> list[dict[str, str]]:
    """Records as in outputs.jsonl: instructions of the template, outputs of random words."""
    rng = random.Random(seed)
    texts = annotate.template_instructions()
    return [
        {"id": f"{seed}-{i}", "split": "judge_train", "instruction": rng.choice(texts), "kind": "given",
         "output": " ".join(rng.choice(annotate.TOPICS) for _ in range(words))}
        for i in range(number)
    ]  # fmt: skip


def run_engine(settings: dict[str, Any]) -> None:
    """The engine's process: a list of chats on each line of its input, the seconds it took on its output."""
    from vllm import LLM, SamplingParams

    tokens = settings.pop("tokens")
    engine = LLM(**settings)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    print("BENCH ready", flush=True)
    for line in sys.stdin:
        chats = json.loads(line)
        began = time.perf_counter()
        answers = engine.chat(chats, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert sum(len(answer.outputs[0].token_ids) for answer in answers) == tokens * len(chats)
        print(f"BENCH {seconds}", flush=True)


def listen(engine: Any) -> str:
    """The next message of the engine's process (its log goes the same way)."""
    for line in engine.stdout:
        if line.startswith("BENCH "):
            return line.split()[1]
    annotate.fail("the engine ended; see its messages above")


def main(
    model: str = typer.Option(annotate.LAPTOP_MODEL, help="Any chat model that vLLM runs."),
    requests: int = typer.Option(128, help="Labels of one repetition."),
    tokens: int = typer.Option(64, help="Length of an answer, in tokens."),
    words: int = typer.Option(40, help="Length of a graded output, in words."),
    seqs: int = typer.Option(64, help="Sequences that either engine runs at once; ours has twice as many requests in flight."),
    repetitions: int = typer.Option(5, help="Repetitions of each side."),
    memory: float = typer.Option(0.4, help="Share of GPU memory for each of the two engines."),
    out: Path | None = typer.Option(None, "--json", help="Write the figures to this file."),
    engine: str = typer.Option("", hidden=True),
) -> None:
    if engine:
        return run_engine(json.loads(engine))
    import torch

    annotate.load_tokenizer(model)  # makes the laptop's model, if it is not there yet
    # The settings of `serve`, said again in the engine's words.
    settings = {"model": model, "max_model_len": MAX_LEN, "max_num_seqs": seqs, "max_num_batched_tokens": 2048, "generation_config": "vllm",
                "logprobs_mode": "processed_logprobs"}  # fmt: skip
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if torch.cuda.is_available():
        settings |= {"gpu_memory_utilization": memory, "max_num_batched_tokens": 8192}
    else:
        settings |= {"dtype": "float32", "enforce_eager": True, "block_size": 32}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "CUDA_VISIBLE_DEVICES": ""}
    arguments = ["--max-num-seqs", str(seqs), "--max-num-batched-tokens", str(settings["max_num_batched_tokens"])]

    rates: dict[str, list[float]] = {"ours": [], "engine": []}
    with tempfile.TemporaryDirectory() as scratch, annotate.serve(model, Path(scratch), max_len=MAX_LEN, memory=memory, arguments=arguments) as server:
        endpoint = FixedLength(server.url, server.key, server.model)

        def grade(instruction: str, output: str) -> dict[str, Any]:
            return annotate.gold_by_chat(endpoint, instruction, output, tokens, "none")

        process = subprocess.Popen(
            [sys.executable, __file__, "--engine", json.dumps({**settings, "tokens": tokens})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        try:
            listen(process)
            for number in range(repetitions + 1):  # the first one warms up
                rows = examples(requests if number else 8, words, seed=number)
                annotate.write_jsonl(Path(scratch, "outputs.jsonl"), rows)
                chats = [annotate.judge_messages(row["instruction"], row["output"]) for row in rows]
                for side in ("ours", "engine") if number % 2 else ("engine", "ours"):
                    if side == "ours":
                        began = time.perf_counter()
                        annotate.label_outputs(Path(scratch, "outputs.jsonl"), Path(scratch, f"labels-{number}.jsonl"), grade, 2 * seqs)
                        seconds = time.perf_counter() - began
                    else:
                        process.stdin.write(json.dumps(chats) + "\n")
                        process.stdin.flush()
                        seconds = float(listen(process))
                    if number:
                        rates[side].append(len(rows) * tokens / seconds)
                        print(f"repetition {number}: {side:6} {rates[side][-1]:8.1f} token/s")
        finally:
            process.stdin.close()
            process.wait()
    ours, bare = statistics.median(rates["ours"]), statistics.median(rates["engine"])
    result = {"ours_tokens_per_s": ours, "engine_tokens_per_s": bare, "ratio": ours / bare}
    print(f"ours {ours:.1f} token/s, engine {bare:.1f} token/s, ratio {ours / bare:.3f}")
    if out:
        annotate.write_json(out, {**result, "repetitions": rates, "settings": {**settings, "requests": requests, "tokens": tokens}})


if __name__ == "__main__":
    typer.run(main)
