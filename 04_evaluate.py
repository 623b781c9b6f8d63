"""Stage 4: how far each judge agrees with gold, and what gold thinks of each policy.

    judges   agreement of every judge of the run with the gold judge, on the judges' test set
    gold     every checkpoint of every policy, scored by its own judge and by gold: the paper's
             Figures 3-5. Where the two curves part, the policy has hacked its judge.

What goes in:   RUN/annotations/, RUN/judges/, RUN/policies/
What comes out: RUN/evaluation/judges.json, judges/NAME.jsonl    agreement; every judgement
                RUN/evaluation/outputs.jsonl                     one output a checkpoint and test instruction
                RUN/evaluation/scores/JUDGE.jsonl                their scores, by own judge and gold
                RUN/evaluation/gold.json, gold.png               the curves

Simpler than the paper, and why:
 1. One output for each instruction and checkpoint; the bands are bootstrap intervals over instructions.
 2. No Arena-Hard yet.

    python 04_evaluate.py judges --run runs/demo
    python 04_evaluate.py gold   --run runs/demo
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

import typer

annotate = import_module("01_annotate")
sft = import_module("02_train_judge")

# ---------------------------------------------------------------------------------------------
# What a run holds.
# ---------------------------------------------------------------------------------------------

GOLD, BASE = "gold", "base"  # the gold judge, and the untrained base model: as a judge, as a policy


def trained_judges(run: Path) -> dict[str, dict[str, Any]]:
    """name -> judge.json of every finished judge of the run, and the untrained base model as a judge."""
    found = {p.parent.name: annotate.read_json(p, ("adapter", *sft.DESCRIBES)) for p in sorted((run / "judges").glob("*/judge.json"))}
    if not found:
        annotate.fail(f"{run}/judges has no finished judge. Run this first: python 02_train_judge.py --run {run} --no-reasoning")
    for name, judge in found.items():
        judge["adapter"] = sft.check_adapter(run / "judges" / name / judge["adapter"], judge["model"], judge["lora_rank"])
    first = next(iter(found.values()))
    return {BASE: {**first, "reasoning": False, "adapter": None, "rubrics": False}, **found}


def trained_policies(run: Path) -> dict[str, dict[str, Any]]:
    """name -> policy.json of every finished policy, with `checkpoints`: step -> adapter folder."""
    needs = ("model", "judge", "lora_rank", "lora_modules", "max_prompt", "max_tokens", "temperature")
    found = {p.parent.name: annotate.read_json(p, needs) for p in sorted((run / "policies").glob("*/policy.json"))}
    if not found:
        annotate.fail(f"{run}/policies has no finished policy. Run this first: python 03_rl.py policy --run {run} --judge direct")
    for name, policy in found.items():
        folders = sorted((run / "policies" / name / "checkpoints").glob("step-*"))
        policy["checkpoints"] = {
            int(f.name.removeprefix("step-")): sft.check_adapter(f, policy["model"], policy["lora_rank"]) for f in folders
        }
    return found


class OneServer:
    """At most one vLLM server at a time: `of(model)` starts it, and ends that of another model.

    It is started when it is first needed, so a command whose work is done starts none.
    """

    def __init__(self, run: Path, users: Iterable[dict[str, Any]]):
        self.run, self.users, self.stack, self.endpoint = run, list(users), ExitStack(), None
        self.loaded: dict[Path, str] = {}

    def of(self, model: str) -> Any:
        if self.endpoint is None or self.endpoint.model != model:
            self.close()
            users = [user for user in self.users if user["model"] == model]
            self.endpoint = self.stack.enter_context(annotate.serve(
                model, self.run / "logs", gpus=users[0].get("gpus", "0"), max_loras=len(users) + 1,
                max_len=max(u["max_prompt"] + u.get("max_thinking", 0) + u.get("max_tokens", 0) for u in users) + 16,
                lora_rank=max(u["lora_rank"] for u in users), lora_modules=sorted({m for u in users for m in u["lora_modules"]}),
            ))  # fmt: skip
            self.loaded = {}
        return self.endpoint

    @contextmanager
    def adapter(self, model: str, path: Path | None) -> Iterator[tuple[Any, str | None]]:
        """(endpoint, served name) of `model` with the adapter in `path`, or without any."""
        endpoint = self.of(model)
        name = f"adapter-{len(self.loaded)}" if path else None
        if path:
            self.loaded[path] = str(name)
            endpoint.load_adapter(name, path)
        yield endpoint, name
        if path:
            endpoint.unload_adapter(name)

    def close(self) -> None:
        self.stack.close()
        self.endpoint = None

    def __enter__(self) -> OneServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def missing(path: Path, ids: Iterable[str]) -> bool:
    return bool(set(ids) - {record["id"] for record in annotate.read_jsonl(path, ["id"])})


# ---------------------------------------------------------------------------------------------
# Scoring outputs with judges, trained or gold.
# ---------------------------------------------------------------------------------------------


def score_outputs(
    path: Path, outputs: Sequence[dict[str, Any]], name: str, judges: dict[str, Any], server: OneServer, threads: int
) -> dict[str, float | None]:
    """id -> score of `outputs` by the judge `name` (gold: its label; others: the expected score)."""
    tasks = {row["id"]: row for row in outputs}
    if name == GOLD:
        options = annotate.read_options(server.run / "annotations")
        todo = missing(path, tasks)
        if todo and options["gold"] != "oracle":  # make room for the gold judge's own server
            server.close()
        with annotate.gold_endpoint(options, server.run / "logs") if todo else ExitStack() as endpoint:
            grade = annotate.gold_judge(options, endpoint)

            def work(row: dict[str, Any]) -> dict[str, Any]:
                verdict = grade(row["instruction"], row["output"])
                return {**verdict, "expected": verdict["label"]}

            records = annotate.complete(path, tasks, work, f"{name} scores", threads)
    elif missing(path, tasks):
        judge = judges[name]
        with server.adapter(judge["model"], judge["adapter"]) as (endpoint, adapter):
            door = sft.open_judge(endpoint, annotate.load_tokenizer(judge["model"]), adapter, judge, server.run)

            def ask(row: dict[str, Any]) -> dict[str, Any]:
                return asdict(annotate.ask_judge(door, row["instruction"], row["output"]))

            records = annotate.complete(path, tasks, ask, f"{name} scores", threads)
    else:
        records = annotate.read_jsonl(path)
    found = {r["id"]: r["expected"] for r in records}
    return {key: found[key] for key in tasks}  # in one order, so that the bootstrap draws the same


def bootstrap(values: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of `values`; None without values."""
    if not values:
        return None
    rng = random.Random(seed)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    tail = (1 - level) / 2
    return means[int(tail * draws)], means[int((1 - tail) * draws) - 1]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain text table; numbers to two places."""
    cells = [list(header)] + [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plan_evaluation(run: Path, gold_curve: bool) -> list[Any]:
    """The calls that `judges`, or `gold`, has still to make: of what the run holds, else of what a run usually has."""
    options = annotate.read_options(annotate.need(run / "annotations" / "config.json", f"01_annotate.py --run {run}").parent)
    facts, folder = annotate.expect(run, options["preset"]), run / "evaluation"

    def judgements(judge: str, outputs: float, path: Path) -> tuple[Any, ...]:
        written = facts["reasoning"] + 1 if judge.startswith("reasoning") else 1
        return f"judgements by {judge}", outputs - annotate.count_lines(path), facts["judge_prompt"], written

    if not gold_curve:
        names = sorted(path.parent.name for path in run.glob("judges/*/judge.json")) or ["direct-sft", "reasoning-sft", "reasoning-rl"]
        return [judgements(name, facts["judge_test"], folder / "judges" / f"{name}.jsonl") for name in [BASE, *names]]
    rl = import_module("03_rl")
    usual = annotate.preset_values(rl.POLICY, options["preset"])
    policies = [annotate.read_options(path.parent) for path in run.glob("policies/*/config.json")]
    policies = policies or [{**usual, "judge": judge} for judge in ("direct-sft", "reasoning-rl")]
    outputs = {p["judge"]: facts["policy_test"] * (1 + math.ceil(p["steps"] / p["checkpoint_every"])) for p in policies}
    number = sum(outputs.values()) - facts["policy_test"] * (len(outputs) - 1)  # one untrained base model
    parts = [("outputs", number - annotate.count_lines(folder / "outputs.jsonl"), facts["instruction"], facts["output"])]
    parts += [judgements(judge, n, folder / "scores" / f"{judge}.jsonl") for judge, n in outputs.items()]
    if options["gold"] != "oracle":
        _, calls, read, _ = judgements(GOLD, number, folder / "scores" / f"{GOLD}.jsonl")
        parts += [("judgements by gold", calls, read, facts["reasoning"] + 1)]
    return parts


# ---------------------------------------------------------------------------------------------
# judges
# ---------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0])
THREADS = typer.Option(64, min=1, help="Requests in flight at once.")


@app.command("judges")
def judges_command(
    run: Path = annotate.RUN, threads: int = THREADS, plan: bool = annotate.PLAN, tokens_per_second: float | None = annotate.RATE
) -> None:
    """Agreement of every judge with gold on the judges' test set: the paper's alpha, x 100."""
    if plan:
        parts = plan_evaluation(run, gold_curve=False)
        return annotate.show_plan(parts, annotate.read_options(run / "annotations")["preset"], tokens_per_second)
    rows = sft.labelled(run, "judge_test")
    judges = trained_judges(run)
    folder = run / "evaluation"
    annotate.lock(folder)
    scores = {}
    with OneServer(run, judges.values()) as server:
        for name, judge in sorted(judges.items(), key=lambda item: item[1]["model"]):
            path = folder / "judges" / f"{name}.jsonl"
            if missing(path, (row["id"] for row in rows)):
                with server.adapter(judge["model"], judge["adapter"]) as (endpoint, adapter):
                    door = sft.open_judge(endpoint, annotate.load_tokenizer(judge["model"]), adapter, judge, run)
                    sft.judge_rows(path, door, rows, name, threads)
            wanted = {row["id"] for row in rows}
            scores[name] = sft.agreement([r for r in annotate.read_jsonl(path, ["id", "gold"]) if r["id"] in wanted])
    annotate.write_json(folder / "judges.json", scores)
    print(table(
        ["judge", "alpha", "alpha (expected)", "exact %", "invalid %", "thinking tokens", "n"],
        [[name, *(scores[name][key] for key in ("alpha", "alpha_expected", "exact", "invalid", "thinking_tokens", "n"))] for name in scores],
    ))  # fmt: skip
    print("Paper, Qwen3-4B / 8B with reasoning, distilled + RL: alpha 85.94 / 89.34; Qwen3-14B without, fine-tuned: 87.82")


# ---------------------------------------------------------------------------------------------
# gold
# ---------------------------------------------------------------------------------------------


def write_output(endpoint: Any, served: str | None, tokenizer: Any, policy: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The record of one output: the policy's answer to the instruction of `row`."""
    (sample,) = endpoint.sample(
        annotate.policy_prompt(tokenizer, row["instruction"]), model=served,
        temperature=policy["temperature"], max_tokens=policy["max_tokens"],
    )  # fmt: skip
    about = {key: row[key] for key in ("policy", "step", "instruction")}
    return {**about, "output": sample.text.strip(), "tokens": len(sample.tokens_T), "finished": sample.finished}


def write_outputs(run: Path, policies: dict[str, Any], server: OneServer, threads: int) -> list[dict[str, Any]]:
    """One output of every checkpoint for every test instruction, in RUN/evaluation/outputs.jsonl.

    Step 0 is the untrained base model; policies of one base share it. A new checkpoint costs only
    its own outputs.
    """
    path = run / "evaluation" / "outputs.jsonl"
    rows = annotate.read_jsonl(run / "annotations" / "instructions.jsonl", ["id", "split", "instruction"])
    rows = [row for row in rows if row["split"] == "policy_test"]
    done: list[dict[str, Any]] = []
    for name, policy in sorted(policies.items(), key=lambda item: item[1]["model"]):
        tokenizer = annotate.load_tokenizer(policy["model"])
        fitting = [r for r in rows if len(annotate.policy_prompt(tokenizer, r["instruction"])) <= policy["max_prompt"]]
        if len(fitting) < len(rows):
            print(f"{name}: {len(rows) - len(fitting)} test instructions left out, longer than {policy['max_prompt']} tokens")
        for step, adapter in {0: None, **policy["checkpoints"]}.items():
            who = f"{BASE}:{policy['model']}" if step == 0 else f"{name}:{step}"
            tasks = {f"{who}:{row['id']}": {**row, "policy": name if step else BASE, "step": step} for row in fitting}
            if not missing(path, tasks):
                done += [r for r in annotate.read_jsonl(path) if r["id"] in tasks]
                continue
            with server.adapter(policy["model"], adapter) as (endpoint, served):
                write = partial(write_output, endpoint, served, tokenizer, policy)
                done += annotate.complete(path, tasks, write, f"outputs of {who}", threads)
    return list({row["id"]: row for row in done}.values())


@app.command("gold")
def gold_command(
    run: Path = annotate.RUN, threads: int = THREADS, plan: bool = annotate.PLAN, tokens_per_second: float | None = annotate.RATE
) -> None:
    """The over-optimisation curves: own judge and gold judge over training steps."""
    if plan:
        parts = plan_evaluation(run, gold_curve=True)
        return annotate.show_plan(parts, annotate.read_options(run / "annotations")["preset"], tokens_per_second)
    judges, policies = trained_judges(run), trained_policies(run)
    folder = run / "evaluation"
    annotate.lock(folder)
    users = [*judges.values(), *({**policy, "max_thinking": 0} for policy in policies.values())]
    with OneServer(run, users) as server:
        outputs = write_outputs(run, policies, server, threads)
        own = {}
        for name in sorted({policy["judge"] for policy in policies.values()}):
            judged = [r for r in outputs if r["step"] == 0 or policies[r["policy"]]["judge"] == name]
            own[name] = score_outputs(folder / "scores" / f"{name}.jsonl", judged, name, judges, server, threads)
        gold = score_outputs(folder / "scores" / f"{GOLD}.jsonl", outputs, GOLD, judges, server, threads)

    curves: dict[str, list[dict[str, Any]]] = {}
    for name, policy in policies.items():
        curves[name] = []
        for step in [0, *policy["checkpoints"]]:
            who = f"{BASE}:{policy['model']}:" if step == 0 else f"{name}:{step}:"
            rows = [r for r in outputs if r["id"].startswith(who)]
            point: dict[str, Any] = {"step": step, "n": len(rows)}
            for key, scores in (("own", own[policy["judge"]]), ("gold", gold)):
                known = [s for r in rows if (s := scores[r["id"]]) is not None]
                point[key], point[f"{key}_interval"] = fmean(known) if known else None, bootstrap(known)
                point[f"{key}_unusable"] = len(rows) - len(known)
            point["tokens"] = fmean(r["tokens"] for r in rows)
            point["unfinished"] = fmean(not r["finished"] for r in rows)
            curves[name].append(point)
    annotate.write_json(folder / "gold.json", {"curves": curves, "judges": {n: p["judge"] for n, p in policies.items()}})
    print(table(
        ["policy against", "step", "own judge", "gold", "tokens", "unfinished", "unusable (own, gold)"],
        [[n, p["step"], p["own"], p["gold"], p["tokens"], p["unfinished"], f"{p['own_unusable']}, {p['gold_unusable']}"] for n in curves for p in curves[n]],
    ))  # fmt: skip
    draw_curves(curves, {n: p["judge"] for n, p in policies.items()}, folder / "gold.png")
    print(f"picture: {folder / 'gold.png'}")


def draw_curves(curves: dict[str, list[dict[str, Any]]], judges: dict[str, str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.6), sharey=True, squeeze=False, layout="constrained")
    for axis, (name, points) in zip(axes[0], curves.items()):
        steps = [p["step"] for p in points]
        for key, text, colour in (("own", f"its judge ({judges[name]})", "tab:orange"), ("gold", "gold judge", "tab:blue")):
            known = [p for p in points if p[key] is not None]
            axis.plot([p["step"] for p in known], [p[key] for p in known], "o-", ms=4, color=colour, label=text)
            low, high = [p[f"{key}_interval"][0] for p in known], [p[f"{key}_interval"][1] for p in known]
            axis.fill_between([p["step"] for p in known], low, high, color=colour, alpha=0.15, lw=0)
        axis.set(title=f"policy trained against: {name}", xlabel="training step", ylim=(0, 9.3), yticks=range(10), xticks=steps)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=8)
    axes[0][0].set_ylabel("mean score on held-out instructions (0-9)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    annotate.start(app)
