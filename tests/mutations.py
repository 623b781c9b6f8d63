"""Put one fault at a time into a copy of the scripts and see that a test fails: python tests/mutations.py

Exit status 1 if a fault goes unnoticed. About 20 minutes on two cores (no live model).
`python tests/mutations.py eq. 4` puts in those whose name has these words.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

# (script, what stands there, the fault, its name)
MUTATIONS = [
    ("01", 'return label - POINTS["claim"] if', "return label if", "content counts the claim"),
    ("01", "return points if claims(output)", "return points if not claims(output)", "truth is gold"),
    ("01", "t.replace(code, ", "t.replace('', ", "an output may hold its own code"),
    ("01", '{match[0][0]} {match[0][1:]}"', '{match[0]}"', "special tokens are not broken up"),
    ("01", "and status < 500", "and status < 900", "one 500 ends the run"),
    ("01", 'get("finish_reason") != "length"', 'get("finish_reason") == "stop"', "other words for stop"),
    ("01", 'verdict["label"] not in (None, row["label"])', "False", "another label is kept"),
    ("01", 'one["output"], "other": two', 'two["output"], "other": one', "outputs of a pair swapped"),
    ("01", "(2025, 8, 5)", "(2025, 8, 6)", "the date in a prompt"),
    ("02", "answer_at - 1 if len(prompt) > prefix", "answer_at if True", "answers one place late"),
    ("02", ".float() / temperature\n        return", ".float()\n        return", "temperature ignored"),
    ("02", "prefix = starts[0] if start else 0", "prefix = start", "a branch sees others"),
    ("02", "causal_lower_right(", "torch.nn.attention.bias.causal_upper_left(", "mask's corner"),
    ("02", "+= range(prefix, prefix + len(branch))", "+= range(start, start + len(branch))", "positions"),
    ("02", "zip(hidden_AD.split(VOCABULARY_CHUNK)", "zip(hidden_AD.flip(0).split(9999)", "chunks"),
    ("02", "/ (n - 1)", "/ n", "alpha without its small-sample term"),
    ("02", "int(label) * p for", "(int(label) + 1) * p for", "expected score off by one"),
    ("02", "(step + 1) / ramp", "step / ramp", "a first step at rate 0"),
    ("02", "parameter.grad = part.view_as(parameter)", "pass", "gradients of the ranks not summed"),
    ("02", "optimizer.load_state_dict(", "str(", "moments lost on resume"),
    ("02", 'names = ("alpha_expected", ', 'names = ("alpha", ', "epoch chosen by the digit"),
    ("02", "if not exact or", "if", "scaled logits go unnoticed"),
    ("03", "(81 - (score - gold) ** 2)", "(81 - abs(score - gold))", "eq. 1 not squared"),
    ("03", "(r - mean) / spread for", "(mean - r) / spread for", "sign of the advantage"),
    ("03", "return -(weights_A * surrogate)", "return (weights_A * surrogate)", "sign of the loss"),
    ("03", "clamp(1 - low, 1 + high)", "clamp(1 - high, 1 + low)", "clip bounds swapped"),
    ("03", "advantages_A).minimum(", "advantages_A).maximum(", "the larger of both"),
    ("03", "exp() - difference - 1)\n    ret", "exp() + difference - 1)\n    ret", "sign in the KL term"),
    ("03", "1 / (length * N)", "1 / (length * len(members))", "normaliser of the micro-batch"),
    ("03", "index in packed.members]", "index in packed.members[::-1]]", "permuted"),
    ("03", "len(active)])", "1]) and (len(rewarded), tokens_here, 1)", "rank's norm"),
    ("03", "for length in lengths for _", "for length in lengths[::-1] for _", "weights mixed up"),
    ("03", "for r in members for x in r.old_T", "for r in members for x in r.sample.logprobs_T", "whose old"),
    ("03", "        adapter_name = publish(", "        publish(", "stale adapter"),
    ("03", "append(1 - won)", "append(won)", "eq. 4: both of a pair win"),
    ("03", "0.5 if chance == 0.5 else ", "", "eq. 4: ties go to the second"),
    ("03", "[i : i + prompts_each][rank::ranks]", "[rank::ranks][i : i + prompts_each]", "shares"),
]  # fmt: skip

TESTS = {"01": ["annotate"], "02": ["frozen", "train_judge"], "03": ["frozen", "rl"]}


def survives(script: str, before: str, after: str) -> bool:
    """Whether the tests of a script still pass with the fault put in."""
    (path,) = ROOT.glob(f"{script}_*.py")
    assert path.read_text().count(before) == 1, f"{path.name}: {before!r} does not stand there once"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for source in ROOT.glob("0*"):
            shutil.copy(source, copy)
        shutil.copytree(ROOT / "tests", copy / "tests")
        (copy / "models").symlink_to(ROOT / "models")
        (copy / path.name).write_text(path.read_text().replace(before, after))
        names = [f"tests/test_{name}.py" for name in TESTS[script]]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stdout
    return result.returncode == 0


if __name__ == "__main__":
    chosen = [mutation for mutation in MUTATIONS if " ".join(sys.argv[1:]) in mutation[3]]
    for script in sorted({script for script, *_ in chosen}):
        assert survives(script, "import annotations", "import annotations"), f"{script} fails as it is"
    missed = 0
    for script, before, after, name in chosen:
        alive = survives(script, before, after)
        missed += alive
        print(f"{'MISSED' if alive else 'caught'}  {script}: {name}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    sys.exit(missed > 0)
