"""The config of ``coterie dynamics``: environments, a mixture of vector fields, its training."""

from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from coterie.core.config import Config
from coterie.core.errors import UserError
from coterie.data.environments import EnvironmentsConfig
from coterie.launch.config_file import DYNAMICS, find
from coterie.launch.load_config import ConfigSource
from coterie.models.dynamics import DynamicsConfig
from coterie.parallel.mixer import MixerConfig


class DynamicsLayout(Config):
    """How the experts are spread over processes. The numbers of a run do not depend on it."""

    ep: int = Field(default=1, ge=1)
    """Expert-parallel size: processes that share the experts. The number of processes is a multiple
    of it; more than ep: replicas of the experts take turns with their environments."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that a rank waits for another in a collective before the run ends with an error."""


class RoundsConfig(Config):
    """What happens after so many rounds."""

    evaluate: int = Field(default=25, ge=0)
    """Rounds between evaluations on held-out trajectories; 0: only after the last round."""
    save: int = Field(default=25, ge=0)
    """Rounds between checkpoints; 0: only after the last round."""
    keep: int = Field(default=3, ge=1)
    """Newest complete checkpoints that stay; older ones are deleted."""


class DynamicsRunConfig(Config):
    """Everything that a run of `coterie dynamics` depends on."""

    name: str = Field(default="dynamics", pattern=r"^[A-Za-z0-9._-]+$")
    """The run's folder under `runs/`, unless one is given on the command line."""
    data: EnvironmentsConfig = EnvironmentsConfig()
    model: DynamicsConfig
    train: MixerConfig = MixerConfig()
    precision: Literal["fp32", "fp64"] = "fp32"
    """Of weights, contexts and trajectories. In fp64 the layouts agree to 1e-9; in fp32 a last bit
    that differs may in time send an environment elsewhere."""
    parallel: DynamicsLayout = DynamicsLayout()
    every: RoundsConfig = RoundsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model.experts % self.parallel.ep:
            raise ValueError(
                f"model.experts is {self.model.experts}, which does not divide over parallel.ep "
                f"{self.parallel.ep} processes"
            )
        if self.train.context_steps + self.train.model_steps == 0:
            raise ValueError(
                "train.context_steps and train.model_steps are both 0: a round is empty"
            )
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of :attr:`precision`."""
        return {"fp32": torch.float32, "fp64": torch.float64}[self.precision]


def load_dynamics_config(
    name: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> DynamicsRunConfig:
    """As :func:`coterie.launch.load_config.load_config`; shipped ones are in configs/dynamics."""
    return ConfigSource.read(find(name, DYNAMICS), overrides).validated(DynamicsRunConfig)


def check_dynamics_world(config: DynamicsRunConfig, world: int) -> None:
    """Raises UserError when ``world`` processes cannot run ``config``."""
    if world % config.parallel.ep:
        raise UserError(
            f"{world} processes cannot have parallel.ep {config.parallel.ep}: their number must be "
            f"a multiple of it"
        )
