"""Put one fault at a time into a copy of the scripts and see that a test fails: python tests/mutations.py

Exit status 1 if a fault goes unnoticed. Takes some minutes: only the fast tests are run.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

# (script, what stands there, the fault, its name)
MUTATIONS = [
    ("02_train_judge.py", "last_of_prompt = first - 1 if", "last_of_prompt = first if", "answers predicted one place late"),
    ("02_train_judge.py", ".float() / temperature", ".float()", "temperature ignored"),
    ("02_train_judge.py", "torch.cat([key_1GSK[:, :, :prefix]", "torch.cat([key_1GSK[:, :, start - prefix : start]", "a branch sees the one before it, not the prefix"),
    ("02_train_judge.py", ".tril(prefix)", ".tril(prefix + 1)", "a token sees the next one"),
    ("02_train_judge.py", "range(prefix, prefix + len(tokens))", "range(start, start + len(tokens))", "positions run on over branches"),
    ("02_train_judge.py", "1 - observed / expected", "1 - observed / expected * (n - 1) / n", "alpha without its small-sample term"),
    ("03_rl.py", "(81 - (score - gold) ** 2)", "(81 - abs(score - gold))", "eq. 1 not squared"),
    ("03_rl.py", "(r - mean) / spread for", "(mean - r) / spread for", "sign of the advantage"),
    ("03_rl.py", "return -(weights_A * surrogate)", "return (weights_A * surrogate)", "sign of the loss"),
    ("03_rl.py", "clamp(1 - low, 1 + high)", "clamp(1 - high, 1 + low)", "clip bounds swapped"),
    ("03_rl.py", "advantages_A).minimum(", "advantages_A).maximum(", "the larger of clipped and unclipped"),
    ("03_rl.py", "difference.exp() - difference - 1", "difference.exp() + difference - 1", "sign in the KL estimator"),
    ("03_rl.py", "(len(r.sample.tokens_T) * count)", "(len(r.sample.tokens_T) * len(members))", "normaliser of the micro-batch, not the step"),
    ("03_rl.py", "for i in dict.fromkeys(packed.owners_A)]", "for i in reversed(dict.fromkeys(packed.owners_A))]", "rollouts of a group permuted"),
    ("03_rl.py", "rollout.advantage = advantage", "group[-1].advantage = advantage", "advantages given to another rollout"),
    ("03_rl.py", "judged[sample].result() for sample in samples_G", "verdict.result() for verdict in judged.values()", "rewards in the order of finishing"),
    ("02_train_judge.py", "        parameter.grad = part.view_as(parameter)", "        pass", "gradients of the ranks not summed"),
    ("03_rl.py", "count, active = sft.over_ranks([len(rewarded), len(rollouts)])", "count, active = len(rewarded), len(rollouts)", "normaliser of the rank, not the step"),
    ("03_rl.py", "* count)] * len(r.sample.tokens_T))", "* count)] * (len(r.sample.tokens_T) - 1) + [0.0])", "stop token masked"),
    ("03_rl.py", "if upcoming else sample(step, name(step))", "if upcoming else sample(step, name(first))", "stale adapter"),
    ("03_rl.py", "points[b].append(1 - won)", "points[b].append(won)", "both of a pair win"),
    ("03_rl.py", "rows_P[i : i + size][rank::ranks]", "rows_P[rank::ranks][i : i + size]", "ranks disagree on what a minibatch is"),
]


def survives(script: str, before: str, after: str) -> bool:
    """Whether the fast tests still pass with the fault put in."""
    text = (ROOT / script).read_text()
    assert text.count(before) == 1, f"{script}: {before!r} stands there {text.count(before)} times"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for source in ROOT.glob("0*.py"):
            shutil.copy(source, copy)
        shutil.copytree(ROOT / "tests", copy / "tests")
        (copy / "models").symlink_to(ROOT / "models")
        (copy / script).write_text(text.replace(before, after))
        names = "loss or update or packed or advantages or equation or alpha or clip or same_step or rewards_stay or loop"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_training.py", "tests/test_ranks.py", "tests/test_pairwise.py", "-k", names]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stdout
    return result.returncode == 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    missed = 0
    for script, before, after, name in MUTATIONS:
        alive = survives(script, before, after)
        missed += alive
        print(f"{'MISSED' if alive else 'caught'}  {script}: {name}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} faults caught")
    sys.exit(missed > 0)
