"""Settings of the training loop and its parts: read before any of them is needed, so apart."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from coterie.core.config import Config
from coterie.models.decoder import Recompute
from coterie.parallel.muon import Scale

Precision = Literal["auto", "fp32", "bf16", "fp64"]
OptimizerKind = Literal["adamw", "muon"]


class TrainConfig(Config):
    """The training loop."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    global_batch: int = Field(ge=1)
    """Sequences in a step, over all ranks."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches that a step is split into. With `global_batch` it fixes the numbers; the number
    of ranks does not change them."""
    precision: Precision = "auto"
    """bf16: matrix products in bfloat16 (autocast), weights in float32. auto: bf16 on CUDA, fp32
    on a CPU."""
    recompute: Recompute = "none"
    """What the backward pass computes again rather than keeps. `selective`: the hidden activations
    of feed-forward layers and experts; nothing is sent twice. `full`: all but each block's
    input."""
    seed: int = Field(default=0, ge=0)
    """Of weights, sample order and routing noise."""
    certify_every: int = Field(default=0, ge=0)
    """Steps between certificates: hashes of weights, optimizer, random numbers and sample ids, for
    `coterie certify`. 0: with each checkpoint alone."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that a rank waits for another in a collective before the run ends with an error."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.global_batch % self.accumulation:
            raise ValueError(
                f"global_batch {self.global_batch} must be a multiple of "
                f"accumulation {self.accumulation}"
            )
        return self


class StageConfig(Config):
    """A second stage of training, which starts from the weights of a run."""

    kind: Literal["aux"] = "aux"
    """aux: auxiliary routers learn to foresee which experts take a token; all else stays as it
    is."""
    weights: str = Field(min_length=1)
    """The folder of that run."""
    step: int | None = Field(default=None, ge=0)
    """Its checkpoint, by the step; null: the newest."""


class OptimizerConfig(Config):
    """AdamW or Muon, with linear warm-up and a decay."""

    kind: OptimizerKind = "adamw"
    """muon: each matrix is updated by its momentum made orthogonal (every expert's by itself); the
    embedding, the output layer and vectors by AdamW, at the same rate."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """Where the decay ends, after the last step: a fraction of the peak."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How the rate falls from its peak."""
    warmup: int = Field(default=50, ge=0)
    """Steps of linear warm-up from zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, on matrices alone: not on norm gains."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of Muon's momentum."""
    nesterov: bool = True
    """Whether Muon looks ahead by one gradient (Nesterov)."""
    muon_scale: Scale = "match_adamw"
    """Muon's factor on the learning rate for an A × B matrix: `match_adamw` 0.2 · √max(A, B), so
    that AdamW's rate and weight decay serve; `original` √max(1, outputs / inputs)."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; null: gradients are not clipped."""

    @model_validator(mode="after")
    def _betas(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must be in [0, 1)")
        return self


class CheckpointConfig(Config):
    """When checkpoints are written, and how many stay."""

    every: int = Field(default=100, ge=0)
    """Steps between checkpoints; 0: only after the last step."""
    keep: int = Field(default=3, ge=1)
    """Newest complete checkpoints that stay; older ones are deleted."""
    asynchronous: bool = True
    """Write in the background. Either way a rank keeps a copy of what it saves in CPU memory."""


class EvaluationConfig(Config):
    """Evaluation on held-out data during training."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: only after the last step."""
    sequences: int | None = Field(default=None, ge=1)
    """Held-out sequences to use; null: all."""
    batch: int = Field(default=32, ge=1)
    """Sequences at once, over all ranks."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Prompts to continue after each evaluation; their images go to TensorBoard."""
    temperature: float = Field(default=0.7, ge=0)
    """Of sampling; 0 takes the most likely token."""


class MonitorConfig(Config):
    """What a run reports."""

    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl and points of TensorBoard."""
    heat_map_every: int = Field(default=100, ge=1)
    """Steps between lines of load.jsonl (the columns of `coterie report`'s heat maps) and between
    heat maps in TensorBoard. Each sums up the steps since the one before."""
    exchange_every: int = Field(default=50, ge=0)
    """Steps between measurements of how long rows travel between ranks that hold different experts,
    hence of what part of it is hidden: after such a step, and the last, its rows are sent once more
    with nobody computing. 0: never."""
