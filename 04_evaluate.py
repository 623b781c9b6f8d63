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

import json
import math
import random
import re
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
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted((run / "judges").glob("*/judge.json"))}
    if not found:
        annotate.fail(f"{run}/judges has no finished judge. Run this first: python 02_train_judge.py --run {run} --no-reasoning")
    for name, judge in found.items():
        judge["adapter"] = run / "judges" / name / judge["adapter"]
    first = next(iter(found.values()))
    return {BASE: {**first, "reasoning": False, "adapter": None}, **found}


def trained_policies(run: Path) -> dict[str, dict[str, Any]]:
    """name -> policy.json of every finished policy, with `checkpoints`: step -> adapter folder."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted((run / "policies").glob("*/policy.json"))}
    if not found:
        annotate.fail(f"{run}/policies has no finished policy. Run this first: python 03_rl.py policy --run {run} --judge direct")
    for name, policy in found.items():
        folders = sorted((run / "policies" / name / "checkpoints").glob("step-*"))
        policy["checkpoints"] = {int(f.name.removeprefix("step-")): f for f in folders}
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
            door = sft.open_judge(endpoint, annotate.load_tokenizer(judge["model"]), adapter, judge)

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


# ---------------------------------------------------------------------------------------------
# judges
# ---------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0])
THREADS = typer.Option(64, help="Requests in flight at once.")


@app.command("judges")
def judges_command(run: Path = annotate.RUN, threads: int = THREADS) -> None:
    """Agreement of every judge with gold on the judges' test set: the paper's alpha, x 100."""
    rows = sft.labelled(run, "judge_test")
    judges = trained_judges(run)
    folder = run / "evaluation"
    scores = {}
    with OneServer(run, judges.values()) as server:
        for name, judge in sorted(judges.items(), key=lambda item: item[1]["model"]):
            path = folder / "judges" / f"{name}.jsonl"
            if missing(path, (row["id"] for row in rows)):
                with server.adapter(judge["model"], judge["adapter"]) as (endpoint, adapter):
                    door = sft.open_judge(endpoint, annotate.load_tokenizer(judge["model"]), adapter, judge)
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
        for step, adapter in {0: None, **policy["checkpoints"]}.items():
            who = f"{BASE}:{policy['model']}" if step == 0 else f"{name}:{step}"
            tasks = {f"{who}:{row['id']}": {**row, "policy": name if step else BASE, "step": step} for row in rows}
            if not missing(path, tasks):
                done += [r for r in annotate.read_jsonl(path) if r["id"] in tasks]
                continue
            with server.adapter(policy["model"], adapter) as (endpoint, served):
                write = partial(write_output, endpoint, served, annotate.load_tokenizer(policy["model"]), policy)
                done += annotate.complete(path, tasks, write, f"outputs of {who}", threads)
    return list({row["id"]: row for row in done}.values())


@app.command("gold")
def gold_command(run: Path = annotate.RUN, threads: int = THREADS) -> None:
    """The over-optimisation curves: own judge and gold judge over training steps."""
    judges, policies = trained_judges(run), trained_policies(run)
    folder = run / "evaluation"
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


# ---------------------------------------------------------------------------------------------
# arena-score: Arena-Hard-V2 verdicts to scores, by the definitions of the benchmark's authors
# (lmarena/arena-hard-auto, show_result.py), in code of our own.
# ---------------------------------------------------------------------------------------------

BASELINES = {"hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"}
STYLE = ("token_len", "header_count", "list_count", "bold_count")
DRAWS, TAIL = 500, 0.05  # bootstrap draws (the authors: 100), and what an interval leaves out on each side

# verdict -> (share of the game won by the answer in position A, battles it counts for)
VERDICTS = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}
VERDICTS |= {label[::-1].replace(">", "<"): worth for label, worth in VERDICTS.items()}  # B<<A is A>>B

Metadata = dict[str, dict[str, dict[str, Any]]]  # model -> uid -> {token_len, header_count, list_count, bold_count}


def read_benchmark(path: Path, needs: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a benchmark's JSONL file; unlike `read_jsonl` this never changes the file."""
    if not path.exists():
        annotate.fail(f"{path} is missing. Give a folder of the benchmark's own layout (question.jsonl, model_answer/, model_judgment/JUDGE/).")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            annotate.fail(f"{path}, line {number}: not JSON ({error}). Remove or mend the line.")
        if not isinstance(record, dict) or any(key not in record for key in needs):
            annotate.fail(f"{path}, line {number}: not a record with the fields {', '.join(needs)}.")
        records.append(record)
    return records


def read_judgments(data: Path, judge: str | None, category: str) -> list[dict[str, Any]]:
    """The judgments of one category by one judge: {uid, category, model, games}.

    `judge`: a folder of `data`/model_judgment; None takes the only one, or gpt-4.1 among several.
    """
    if category not in BASELINES:
        annotate.fail(f"--category {category}: must be one of {', '.join(BASELINES)}.")
    judges = sorted({path.parent.name for path in (data / "model_judgment").glob("*/*.jsonl")})
    judge = judge or (judges[0] if len(judges) == 1 else "gpt-4.1")
    if judge not in judges:
        annotate.fail(f"{data}/model_judgment has no judge {judge}; it has: {', '.join(judges) or 'none'}. Name one with --judge.")
    files = sorted((data / "model_judgment" / judge).glob("*.jsonl"))
    rows = [row for path in files for row in read_benchmark(path, ("uid", "category", "model", "games"))]
    found = [row for row in rows if row["category"] == category]
    if not found:
        have = ", ".join(sorted({row["category"] for row in rows})) or "nothing"
        annotate.fail(f"{data}/model_judgment/{judge} has no judgment of category {category}; it has {have}.")
    return found


def read_metadata(data: Path) -> Metadata:
    """The style metadata of every model with answers in `data`; a file is of the model in its first row."""
    found: Metadata = {}
    for path in sorted((data / "model_answer").glob("*.jsonl")):
        rows = read_benchmark(path, ("uid", "model", "metadata"))
        for row in rows:
            if not isinstance(row["metadata"], dict) or set(STYLE) - row["metadata"].keys():
                annotate.fail(f"{path}: uid {row['uid']} has no metadata with {', '.join(STYLE)}. Answers written by `arena` have it.")
        if rows:
            found[rows[0]["model"]] = {row["uid"]: row["metadata"] for row in rows}
    return found


def verdicts(row: dict[str, Any]) -> list[str | None]:
    """The two verdicts of a judgment: baseline in position A, then candidate in A; None where there is none."""
    scores = [game.get("score") if isinstance(game, dict) else None for game in row["games"] or []]
    return [score if score in VERDICTS else None for score in [*scores, None, None][:2]]


def battles(row: dict[str, Any]) -> list[float]:
    """What the candidate won of each battle: 0, 0.5 or 1. None at all unless both games have a verdict."""
    first, second = verdicts(row)
    if first is None or second is None:
        return []
    (lost, n_first), (won, n_second) = VERDICTS[first], VERDICTS[second]
    return [1 - lost] * n_first + [won] * n_second


def style_metadata(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold spans of an answer, counted as the benchmark counts them.

    The contents of code blocks are taken out first, wherever else they occur too (so the authors).
    """
    for block in re.findall("```([^`]*)```", text):
        text = text.replace(block, "")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def style_difference(candidate: dict[str, Any], baseline: dict[str, Any]) -> list[float]:
    """[length, headers, lists, bold] of the candidate against the baseline's answer, each in (-1, 1).

    Length: (a - b) / (a + b) tokens. Markdown: the same of the counts a token, with 1 added below.
    """
    counts = [[sum(v.values()) if isinstance(v, dict) else v for v in map(side.__getitem__, STYLE)] for side in (candidate, baseline)]
    (a, *marks_a), (b, *marks_b) = counts
    densities = [(x / (a + 1), y / (b + 1)) for x, y in zip(marks_a, marks_b)]
    return [(a - b) / max(a + b, 1), *((x - y) / (x + y + 1) for x, y in densities)]


def fit_bradley_terry(features_RK: Any, battles_R: Any, won_R: Any, start_K: Any) -> Any:
    """The K coefficients that maximise the likelihood: row r won `won_R[r]` of `battles_R[r]` battles.

    Newton's method with step halving, to convergence, no regularisation. The tiny diagonal only
    slows the steps: it keeps the system solvable where a model has won all, or a feature is constant.
    """
    import numpy as np

    def likelihood(beta_K: Any) -> float:
        logits_R = features_RK @ beta_K
        return float(won_R @ logits_R - battles_R @ np.logaddexp(0, logits_R))

    beta_K = start_K
    for _ in range(100):
        p_R = 1 / (1 + np.exp(-features_RK @ beta_K))
        hessian_KK = (features_RK.T * (battles_R * p_R * (1 - p_R))) @ features_RK
        step_K = np.linalg.solve(hessian_KK + 1e-6 * np.eye(len(beta_K)), features_RK.T @ (won_R - battles_R * p_R))
        while likelihood(beta_K + step_K) < likelihood(beta_K) - 1e-6:
            step_K = step_K / 2
        beta_K = beta_K + step_K
        if np.abs(step_K).max() < 1e-7:
            break
    return beta_K


def arena_scores(rows: Sequence[dict[str, Any]], metadata: Metadata, category: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """model -> {score, score_style, ci, ci_style, battles}, in per cent of battles won against the baseline.

    Without style control: the mean over the model's battles. With: one Bradley-Terry model of all
    models' battles, win ~ sigmoid(coefficient of the model + style difference), style z-scored over
    all battles; the score is the win rate at the style of the average battle. Intervals: 5 to 95 %
    of a seeded bootstrap over battles. The baseline itself stands at 50.
    """
    import numpy as np

    baseline, rng = BASELINES[category], np.random.default_rng(seed)
    rows = [row for row in rows if battles(row)]
    if not rows:
        annotate.fail(f"no judgment of category {category} has a verdict in both games: nothing to score.")
    for row in rows:
        for model in (row["model"], baseline):
            if model not in metadata:
                annotate.fail(f"model {model} has judgments or is the baseline, but no answers in model_answer/ (a file whose first row names it).")
            if row["uid"] not in metadata[model]:
                annotate.fail(f"uid {row['uid']} of {row['model']} is unknown: model_answer/ has no answer of {model} to it.")
    models = sorted({row["model"].split("/")[-1] for row in rows})
    model_R = np.array([models.index(row["model"].split("/")[-1]) for row in rows])
    row_B = np.repeat(np.arange(len(rows)), [len(battles(row)) for row in rows])  # B battles of R judgments
    won_B = np.array([won for row in rows for won in battles(row)])
    style_R4 = np.array([style_difference(metadata[row["model"]][row["uid"]], metadata[baseline][row["uid"]]) for row in rows])
    spread_4 = style_R4[row_B].std(axis=0, ddof=1)
    style_R4 = (style_R4 - style_R4[row_B].mean(axis=0)) / np.where(spread_4 > 1e-12, spread_4, 1)
    features_RK = np.hstack([np.eye(len(models))[model_R], style_R4])

    def fit(picked: Any, start_K: Any) -> Any:
        weights = np.bincount(row_B[picked], minlength=len(rows)), np.bincount(row_B[picked], won_B[picked], len(rows))
        return fit_bradley_terry(features_RK, *weights, start_K)

    beta_K = fit(slice(None), np.zeros(features_RK.shape[1]))
    draws_DK = np.array([fit(rng.integers(len(row_B), size=len(row_B)), beta_K) for _ in range(DRAWS)])

    def interval(draws: Any) -> list[float]:
        return [100 * float(q) for q in np.quantile(draws, (TAIL, 1 - TAIL))]

    scores: dict[str, dict[str, Any]] = {baseline: {"score": 50.0, "score_style": 50.0, "ci": [50.0] * 2, "ci_style": [50.0] * 2, "battles": 0}}
    for k, model in enumerate(models):
        own = won_B[model_R[row_B] == k]
        means_D = rng.choice(own, (DRAWS, len(own))).mean(axis=1)
        plain = {"score": 100 * float(own.mean()), "ci": interval(means_D), "battles": len(own)}
        styled = {"score_style": 100 / (1 + math.exp(-beta_K[k])), "ci_style": interval(1 / (1 + np.exp(-draws_DK[:, k])))}
        scores[model] = {**scores.get(model, styled), **plain}
    return scores


def judge_sanity(rows: Sequence[dict[str, Any]], metadata: Metadata, category: str) -> dict[str, Any]:
    """How far the judge can be trusted, over the judgments `rows`.

    consistent: share of questions whose two games have the same winner, or are both ties; chance
    is not 0. position: share won by position A, ties half; 0.5 is no preference. unparsable: share
    of answered games without a verdict. missing: games never answered. length: correlation of the
    candidate's share with (a - b) / (a + b) tokens.
    """
    import numpy as np

    games = [game for row in rows for game in [*(row["games"] or []), None, None][:2]]
    answered = [g for g in games if isinstance(g, dict) and not g.get("error")]
    usable = [row for row in rows if battles(row)]
    first_A, second_A = (np.array([VERDICTS[verdicts(row)[i]][0] for row in usable]) for i in (0, 1))
    share = (1 - first_A + second_A) / 2
    longer = np.array([style_difference(metadata[r["model"]][r["uid"]], metadata[BASELINES[category]][r["uid"]])[0] for r in usable])
    known = len(usable) > 1 and share.std() > 0 and longer.std() > 0
    return {
        "questions": len(rows),
        "missing": len(games) - len(answered),
        "unparsable": fmean(g.get("score") not in VERDICTS for g in answered) if answered else None,
        "consistent": float(np.mean(1 - first_A == second_A)) if usable else None,
        "position": float(np.mean([first_A, second_A])) if usable else None,
        "length": float(np.corrcoef(share, longer)[0, 1]) if known else None,
    }


def show_scores(scores: dict[str, dict[str, Any]], rows: Sequence[dict[str, Any]], metadata: Metadata, category: str) -> dict[str, dict[str, Any]]:
    """Print the scores of a category and, of each model, how sane its judge was; the latter comes back."""
    order = sorted(scores, key=lambda model: -scores[model]["score_style"])
    print(table(
        [category, "score", "5-95 %", "style control", "5-95 %", "battles"],
        [[m, s["score"], "{:.1f}-{:.1f}".format(*s["ci"]), s["score_style"], "{:.1f}-{:.1f}".format(*s["ci_style"]), s["battles"]] for m in order for s in [scores[m]]],
    ))  # fmt: skip
    names = sorted({row["model"].split("/")[-1] for row in rows})
    sanity = {name: judge_sanity([row for row in rows if row["model"].split("/")[-1] == name], metadata, category) for name in names}
    print(table(["the judge, on", *next(iter(sanity.values()))], [[name, *values.values()] for name, values in sanity.items()]))
    return sanity


@app.command("arena-score")
def arena_score_command(
    data: Path = typer.Option(..., help="Folder of the benchmark's own layout: model_answer/*.jsonl, model_judgment/JUDGE/*.jsonl."),
    category: str = typer.Option(..., help=f"One of {', '.join(BASELINES)}."),
    json_path: Path | None = typer.Option(None, "--json", help="Write the scores to this file."),
    judge: str | None = typer.Option(None, help="Folder in model_judgment. Default: the only one, or gpt-4.1."),
    seed: int = typer.Option(0, help="Seed of the bootstrap."),
) -> None:
    """Scores of an Arena-Hard-V2 folder, with and without style control, as its authors compute them."""
    rows, metadata = read_judgments(data, judge, category), read_metadata(data)
    scores = arena_scores(rows, metadata, category, seed)
    if json_path:
        annotate.write_json(json_path, scores)
    show_scores(scores, rows, metadata, category)


if __name__ == "__main__":
    app()
