"""Where the fused kernels are found; tests put the same ones, compiled for the host, there."""

from typing import Any

import torch

library: Any = torch.ops.coterie
