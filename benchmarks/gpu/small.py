"""A small layer, forward and backward over virtual ranks, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.small [--device cpu]

Two ranks, uneven rows, an expert without any, two manners. Ends with an error where results are not
close to PyTorch's own.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# each tensor is an allocation of its own, so that its ends are seen
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from benchmarks.gpu import program
from coterie.csrc.fused_launch import Manner
from tests.fused_layer import Fused, Layer, errors, reference


def main() -> int:
    options = program.options(__doc__)
    device = program.begin(options)
    tokens = 150 if options.device == "cuda" else 20
    given = Layer(R=2, E=8, K=2, T=tokens, D=192, F=128, half=True).inputs(device)
    truth = reference(given, torch.float64)
    fused = Fused(given)
    worst = 0.0
    for manner in (Manner(), Manner(communication=3, slabs=1, tile_columns=128)):
        found = errors(fused.run(manner), truth)
        print(found, flush=True)
        worst = max(worst, *(norm for _, norm in found.values()))
    return 0 if worst < 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
