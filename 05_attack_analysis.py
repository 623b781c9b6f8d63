"""Stage 5: does what fools one judge fool the others?

    transfer   outputs of each final policy and of the base policy on the same instructions,
               scored by every judge at hand: the lift that each policy's training brought
    summary    the run's results in one table

What goes in:   RUN/evaluation/ (outputs and scores of stage 4), RUN/judges/
What comes out: RUN/attacks/scores/JUDGE.jsonl          scores that stage 4 did not need
                RUN/attacks/transfer.json, transfer.png  mean lift over the base policy, with intervals

A policy that became better lifts every column, gold included. One that learned its judge's
weakness lifts that judge's column, and those of the judges that share the weakness.

Simpler than the paper, and why:
 1. The other judges are those of the run: gold, the trained ones and the untrained base model.
    The paper asks GPT-4.1 through Arena-Hard as well.

    python 05_attack_analysis.py transfer --run runs/demo
    python 05_attack_analysis.py summary  --run runs/demo
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

import typer

annotate = import_module("01_annotate")
evaluate = import_module("04_evaluate")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0])


def lifts(
    final: dict[str, float | None], base: dict[str, float | None]
) -> dict[str, Any]:
    """Mean of (score of the final policy - score of the base policy) over instructions both were scored on.

    `final`, `base`: instruction id -> score, None where the judgement was unusable.
    """
    pairs = [(s, b) for key, s in final.items() if s is not None and (b := base.get(key)) is not None]
    differences = [s - b for s, b in pairs]
    return {
        "lift": fmean(differences) if pairs else None,
        "interval": evaluate.bootstrap(differences),
        "base": fmean(b for _, b in pairs) if pairs else None,
        "final": fmean(s for s, _ in pairs) if pairs else None,
        "n": len(pairs),
        "unusable": len(final) - len(pairs),
    }


@app.command("transfer")
def transfer_command(
    run: Path = annotate.RUN,
    threads: int = evaluate.THREADS,
    show: int = typer.Option(3, help="Most suspicious outputs printed of each policy."),
) -> None:
    """The matrix policies x judges of mean score lift over the base policy."""
    annotate.need(run / "evaluation" / "gold.json", f"04_evaluate.py gold --run {run}")
    judges, policies = evaluate.trained_judges(run), evaluate.trained_policies(run)
    everything = annotate.read_jsonl(run / "evaluation" / "outputs.jsonl", ["id", "policy", "step", "instruction", "output"])
    last = {name: max(policy["checkpoints"]) for name, policy in policies.items()}
    outputs = [r for r in everything if r["policy"] == evaluate.BASE or r["step"] == last.get(r["policy"])]

    scores: dict[str, dict[str, float | None]] = {}
    with evaluate.OneServer(run, judges.values()) as server:
        for name in (evaluate.GOLD, *sorted(judges, key=lambda judge: judges[judge]["model"])):
            # What stage 4 has scored stays as it is; the rest is scored here, once.
            known = {r["id"]: r["expected"] for r in annotate.read_jsonl(run / "evaluation" / "scores" / f"{name}.jsonl", ["id", "expected"])}
            rest = [r for r in outputs if r["id"] not in known]
            path = run / "attacks" / "scores" / f"{name}.jsonl"
            scores[name] = known | (evaluate.score_outputs(path, rest, name, judges, server, threads) if rest else {})

    matrix: dict[str, dict[str, Any]] = {}
    for name, policy in policies.items():
        base_id = f"{evaluate.BASE}:{policy['model']}:"
        final_id = f"{name}:{last[name]}:"
        matrix[name] = {}
        for judge, known in scores.items():
            final = {i.removeprefix(final_id): s for i, s in known.items() if i.startswith(final_id)}
            base = {i.removeprefix(base_id): s for i, s in known.items() if i.startswith(base_id)}
            matrix[name][judge] = {**lifts(final, base), "own": judge == policy["judge"]}
    annotate.write_json(run / "attacks" / "transfer.json", matrix)

    print("Mean lift over the base policy, in points of 9 [95 % bootstrap interval over instructions]; * its own judge")
    print(evaluate.table(["policy against", *scores], [[name, *(cell(c) for c in row.values())] for name, row in matrix.items()]))
    for name, policy in policies.items():
        suspicious(name, [r for r in outputs if r["policy"] == name], scores[policy["judge"]], scores[evaluate.GOLD], show)
    draw_matrix(matrix, run / "attacks" / "transfer.png")
    print(f"picture: {run / 'attacks' / 'transfer.png'}")


def cell(entry: dict[str, Any]) -> str:
    if entry["lift"] is None:
        return "none usable"
    low, high = entry["interval"]
    return f"{entry['lift']:+.2f} [{low:+.2f}, {high:+.2f}]{'*' if entry['own'] else ' '}"


def suspicious(
    name: str, rows: list[dict[str, Any]], own: dict[str, float | None], gold: dict[str, float | None], show: int
) -> None:
    """Print the outputs whose own judge scores them furthest above gold."""
    gaps = [(o - g, o, g, r) for r in rows if (o := own[r["id"]]) is not None and (g := gold[r["id"]]) is not None]
    print(f"\nmost suspicious outputs of the policy trained against {name}:")
    for _, o, g, row in sorted(gaps, key=lambda gap: -gap[0])[:show]:
        print(f"  own judge {o:.1f}, gold {g}: {row['instruction']}\n    {' '.join(row['output'].split())[:300]}")


def draw_matrix(matrix: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    policies, judges = list(matrix), list(next(iter(matrix.values())))
    values = [[matrix[p][j]["lift"] if matrix[p][j]["lift"] is not None else float("nan") for j in judges] for p in policies]
    figure, axis = plt.subplots(figsize=(1.7 * len(judges) + 1.5, 0.9 * len(policies) + 1.6), layout="constrained")
    limit = max([1.0, *(abs(v) for row in values for v in row if v == v)])
    image = axis.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for y, policy in enumerate(policies):
        for x, judge in enumerate(judges):
            entry = matrix[policy][judge]
            text = "none" if entry["lift"] is None else f"{entry['lift']:+.2f}\n[{entry['interval'][0]:+.1f}, {entry['interval'][1]:+.1f}]"
            dark = entry["lift"] is not None and abs(entry["lift"]) > 0.65 * limit
            axis.text(x, y, text + ("\nown judge" if entry["own"] else ""), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axis.set_xticks(range(len(judges)), judges, fontsize=9)
    axis.set_yticks(range(len(policies)), [f"against\n{p}" for p in policies], fontsize=9)
    axis.set(title="lift over the base policy (rows: policies, columns: judges)")
    figure.colorbar(image, label="points of 9")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@app.command("summary")
def summary_command(run: Path = annotate.RUN) -> None:
    """The run's results in one table: judges, policies, transfer."""
    read = {}
    for name, command in (
        ("evaluation/judges", "04_evaluate.py judges"), ("evaluation/gold", "04_evaluate.py gold"), ("attacks/transfer", "05_attack_analysis.py transfer"),
    ):  # fmt: skip
        read[name] = json.loads(annotate.need(run / f"{name}.json", f"{command} --run {run}").read_text())
    print(f"\n=== {run} ===")
    rows: list[list[Any]] = []
    for name, score in read["evaluation/judges"].items():
        rows.append([f"judge {name}", f"alpha {score['alpha']:.1f}", f"invalid {score['invalid']:.1f} %", f"n = {score['n']}"])
    for name, curve in read["evaluation/gold"]["curves"].items():
        first, end = curve[0], curve[-1]
        for key, text in (("own", "own judge"), ("gold", "gold")):
            change = [f"{p[key]:.2f}" if p[key] is not None else "none" for p in (first, end)]
            rows.append([f"policy against {name}, step {end['step']}", text, " -> ".join(change), f"n = {end['n']}"])
    for name, row in read["attacks/transfer"].items():
        rows += [[f"transfer of policy {name}", f"on {judge}", cell(entry), f"n = {entry['n']}"] for judge, entry in row.items()]
    print(evaluate.table(["what", "", "", ""], rows))
    print(f"pictures: {run}/evaluation/gold.png {run}/attacks/transfer.png")


if __name__ == "__main__":
    app()
