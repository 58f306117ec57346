"""A run's config: the tree of its components' configs, and the rules that join them."""

from typing import Self

from pydantic import Field, model_validator

from coterie.core.config import Config
from coterie.data import DataConfig
from coterie.models import DecoderConfig
from coterie.parallel.config import (
    CheckpointConfig,
    EvaluationConfig,
    MonitorConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)
from coterie.parallel.layout import LayoutConfig


class RunConfig(Config):
    """Everything a training run depends on."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$")
    """The run's folder under `runs/`, unless one is given on the command line."""
    model: DecoderConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    stage: StageConfig | None = None
    """A second stage of training, which starts from the weights of a run; null: this is the first,
    from random weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: LayoutConfig = LayoutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optimizer.warmup > self.train.steps:
            raise ValueError(
                f"optimizer.warmup {self.optimizer.warmup} must be at most train.steps "
                f"{self.train.steps}; add optimizer.warmup={self.train.steps} or less"
            )
        moe, precision = self.model.moe, self.train.precision
        if moe is not None and moe.exchange.kind == "fused" and precision not in ("auto", "bf16"):
            raise ValueError(
                f"train.precision is {precision}, but with model.moe.exchange.kind fused bf16 is "
                "accepted, and auto, which is bf16 on a GPU"
            )
        if self.model.auxiliary != (self.stage is not None):
            raise ValueError(
                "model.moe.router.auxiliary or model.mixture_of_depths.auxiliary (routers that "
                "foresee are trained) and stage (the run whose weights they start from) need each "
                "other; 'coterie train RUN --stage aux' sets both"
            )
        return self
