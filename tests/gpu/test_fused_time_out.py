"""A rank that waits in vain ends its launch, and says what it waited for."""

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# only rank 0 of two is there: the other one never says that its rows are in its window
WAITING = """
import sys, time
import torch
from benchmarks.gpu import device as gpu
from coterie.csrc import fused
from coterie.csrc.fused_launch import Manner, complaint
from tests.fused_layer import Fused, Layer

device = gpu.use(sys.argv[1])
alone = Fused(Layer(R=2, E=4, K=2, T=30, D=64, F=128).inputs(device))
begin = time.monotonic()
try:
    fused.dispatch(alone.here()[:1], alone.w_in[:1], Manner(patience=0.5), keep=False)
    gpu.ready(device)
except RuntimeError as error:
    print(f"ended after {time.monotonic() - begin:.1f} s with {type(error).__name__}", flush=True)
    print(complaint(), flush=True)
    raise
"""


def test_it_is_named(device: torch.device) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITING, device.type],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0, done.stdout
    told = "rank 0 waited for the rows of rank 1 (epoch 1"
    assert told in done.stdout, done.stdout + done.stderr
