"""Our runtime's training step."""

from datetime import timedelta

import torch
from torch import Tensor

from benchmarks.steps.model import Contestant, Model, Split
from coterie.data import TEXT, Batch
from coterie.launch.assemble import build_model
from coterie.launch.config import RunConfig
from coterie.models.placement import parameter_counts
from coterie.parallel.distributed import make_groups
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.precision import resolve
from coterie.parallel.rules import layout_of
from coterie.parallel.step import StepSettings, train_step


def run_config(model: Model, split: Split | None = None) -> RunConfig:
    """The run config that describes ``model``, on one process or on those of ``split``."""
    split = split or Split(world=1)
    return RunConfig.model_validate(
        {
            "model": {
                "vocabulary": model.vocabulary,
                "width": model.width,
                "layers": model.layers,
                "attention": {"heads": model.heads, "rope_theta": model.rope_theta},
                "moe": {
                    "experts": {"count": model.experts, "hidden": model.hidden},
                    "router": {"k": model.k, "balance_loss": model.balance_loss, "z_loss": 0.0},
                },
                "norm_eps": model.norm_eps,
            },
            "data": {"sequence": model.sequence},
            "train": {
                "steps": 1000,
                "global_batch": model.global_batch,
                "accumulation": split.micro_batches(model),
                "precision": "fp32",
            },
            "optimizer": {
                "lr": model.lr,
                "warmup": 0,
                "betas": model.betas,
                "eps": model.eps,
                "weight_decay": model.weight_decay,
                "clip": model.clip,
            },
            "parallel": {
                "tp": split.tp,
                "pp": split.pp,
                "ep": split.ep,
                "etp": split.etp,
            },
        }
    )


def ours(model: Model, split: Split) -> Contestant:
    """Our step for ``split``; the default process group is up, and all its ranks call."""
    return _Step(model, split)


class _Step:
    def __init__(self, model: Model, split: Split) -> None:
        config = run_config(model, split)
        layout = layout_of(config.parallel, split.world, config.model)
        self.ranks = make_groups(layout, torch.device("cpu"), timedelta(minutes=5))
        self.model = build_model(config, self.ranks)
        self.optimizer = Optimizer(self.model, config.optimizer)
        precision = resolve(config.train.precision, self.ranks.device)
        self.settings = StepSettings(precision, config.optimizer.clip, config.train.seed)
        self.micro_batches = split.micro_batches(model)
        self.parameters, _ = parameter_counts(config.model)
        self.steps = 0

    def step(self, tokens_BC: Tensor) -> float:
        own_BC = tokens_BC.chunk(self.ranks.layout.dp)[self.ranks.place.dp]
        batches = [_batch(part_BC) for part_BC in own_BC.chunk(self.micro_batches)]
        self.steps += 1
        return train_step(self.model, self.optimizer, batches, self.steps, self.settings).loss


def _batch(tokens_BC: Tensor) -> Batch:
    tokens_BS = tokens_BC[:, :-1].contiguous()
    rows_B = torch.arange(len(tokens_BC))
    return Batch(
        tokens_BS=tokens_BS,
        targets_BS=tokens_BC[:, 1:].contiguous(),
        modality_BS=torch.full_like(tokens_BS, TEXT),
        segment_BS=torch.zeros_like(tokens_BS),
        padding_BS=torch.zeros_like(tokens_BS, dtype=torch.bool),
        sample_B=rows_B,
        index_B=rows_B,
    )
