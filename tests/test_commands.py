"""The README's commands at their smallest, as a user runs them, on real servers and real training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, descendants, living, processes_naming

annotate = import_module("01_annotate")
sft = import_module("02_train_judge")
rl = import_module("03_rl")

RUN = Path("runs/test-smallest")
DATA = "--judge-train 6 --judge-validation 4 --judge-test 4 --policy-train 6 --policy-test 3 --outputs 2 --output-tokens 16"
RL = "--steps 2 --prompts 2 --group 3 --minibatches 2"
ONE = "--steps 1 --prompts 1 --group 2 --minibatches 1"
COMMANDS = [
    f"01_annotate.py --preset laptop --run {RUN} {DATA} --pairs --efforts low,high --rubrics",
    f"02_train_judge.py --preset laptop --run {RUN} --no-reasoning --epochs 2 --batch 12",
    f"02_train_judge.py --run {RUN} --reasoning --effort low --rubrics --epochs 1 --batch 12 --max-thinking 48",
    f"02_train_judge.py --run {RUN} --no-reasoning --pairwise --epochs 1 --batch 6",
    f"03_rl.py judge --run {RUN} --judge reasoning-low-rubrics {ONE} --max-tokens 48",
    f"03_rl.py policy --run {RUN} --judge direct {RL} --max-tokens 16 --checkpoint-every 1 --beta 0.01",
    f"03_rl.py policy --run {RUN} --judge reasoning-low-rubrics {ONE} --max-tokens 16",
    f"03_rl.py policy --run {RUN} --judge direct-pairwise {ONE} --max-tokens 16",
    f"03_rl.py policy --run {RUN} --judge truth {ONE} --max-tokens 16",
]
