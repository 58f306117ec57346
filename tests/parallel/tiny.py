"""A tiny mixture of experts, its data, and the pieces of a run, on one process or on several."""

from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.data import Sampler, TokenDataset, Vocabulary, open_dataset, write_dataset
from coterie.launch.assemble import build_model
from coterie.launch.config import RunConfig
from coterie.models import Decoder
from coterie.parallel.checkpoint import Checkpointer
from coterie.parallel.distributed import Ranks, make_groups
from coterie.parallel.layout import Layout
from coterie.parallel.load import LayerLoad
from coterie.parallel.model import ParallelModel
from coterie.parallel.monitors import Monitor
from coterie.parallel.part import Part
from coterie.parallel.run_state import model_parts, optimizer_parts
from coterie.parallel.step import StepReport
from coterie.parallel.trainer import Trainer

VOCABULARY = Vocabulary(levels=3, side=2)
SEQUENCE = 32
ALONE = Ranks(0, torch.device("cpu"), Layout())


def write_data(path: Path, rows: int = 40, held_out: int = 7, seed: int = 0) -> Path:
    """Documents of text, an image and text, of many lengths: most rows end in padding."""
    gen = np.random.default_rng(seed)
    with write_dataset(path, VOCABULARY, SEQUENCE, {}) as writer:
        for split, count in (("train", rows), ("held_out", held_out)):
            for _ in range(count):
                text = gen.integers(97, 107, gen.integers(8, 24))
                image = VOCABULARY.captioned(gen.integers(0, 3, (2, 2)), "ab")
                writer.add(split, VOCABULARY.join([text[:4], image, text[4:]]))
    return path


def tiny_config(data: Path, **sections: Any) -> RunConfig:
    """Three layers, the first dense; eight experts and a shared one. ``sections`` are merged in;
    ``router``: into the router's settings."""
    router = {"k": 2, "jitter": 0.1, "capacity_factor": 1.0, **sections.pop("router", {})}
    tree: dict[str, Any] = {
        "model": {
            "vocabulary": VOCABULARY.size,
            "width": 16,
            "layers": 3,
            "attention": {"heads": 2, "kv_heads": 1, "qk_norm": True},
            "feed_forward": {"hidden": 16},
            "moe": {
                "experts": {"count": 8, "hidden": 8},
                "router": router,
                "shared": {"hidden": 8},
                "shared_gate": True,
            },
            "dense_layers": [0],
        },
        "data": {"path": str(data), "sequence": SEQUENCE},
        "train": {"steps": 3, "global_batch": 8, "accumulation": 2, "precision": "fp64", "seed": 3},
        "optimizer": {"warmup": 1, "lr": 1e-2},
        "checkpoint": {"every": 0},
        "evaluation": {"batch": 4},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return RunConfig.model_validate(tree)


def join(world: int, ep: int = 1, **axes: Any) -> Ranks:
    """This process's place among ``world`` ranks of the default group; ``ALONE`` without one."""
    if world == 1:
        return ALONE
    assert dist.get_world_size() == world
    split = prod(axes.get(name, 1) for name in ("pp", "tp", "cp", "dp_shard"))
    layout = Layout(ep=ep, dp_replicate=world // split, **axes)
    return make_groups(layout, torch.device("cpu"), timedelta(seconds=60))


def model_of(config: RunConfig, ranks: Ranks) -> ParallelModel:
    return build_model(config, ranks)


def decoder_of(model: ParallelModel) -> Decoder:
    """The whole decoder, or the one stage of it that is here."""
    (decoder,) = model.decoders
    return decoder


def sampler_of(config: RunConfig) -> Sampler:
    dataset = open_dataset(str(config.data.path))
    return Sampler(dataset, config.train.global_batch, config.train.seed)


def held_out_of(config: RunConfig) -> TokenDataset:
    return open_dataset(str(config.data.path), "held_out")


def checkpointer_of(config: RunConfig, folder: Path, ranks: Ranks) -> Checkpointer:
    return Checkpointer(folder / "checkpoints", config.checkpoint, ranks.saving)


def trainer_of(
    config: RunConfig, ranks: Ranks, checkpointer: Checkpointer, monitors: list[Monitor]
) -> Trainer:
    """A trainer as the command makes it; ``monitors`` may be given to every rank."""
    return Trainer(
        model_of(config, ranks),
        sampler_of(config),
        held_out_of(config),
        config.train,
        config.optimizer,
        config.evaluation,
        checkpointer,
        {"config": config.model_dump(mode="json")},
        monitors,
        exchange_every=config.monitor.exchange_every,
    )


class Recorder(Monitor):
    """Keeps every report, without what differs from run to run or from layout to layout."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []

    def step(self, report: StepReport) -> None:
        seen = dict(vars(report))
        del seen["seconds"], seen["layers"], seen["exchange"]
        sums = {"load": report.load, "dropped": report.dropped, "entropy": report.entropy}
        self.reports.append({**seen, **sums})

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.evaluations.append((step, metrics))


def load_of(rows: list[list[int]], **counts: Any) -> LayerLoad:
    """Of ``rows`` by modality and expert; ``counts``: of the other fields, zero without them."""
    rows_ME = np.array(rows)
    experts, modalities = np.zeros_like(rows_ME[0]), np.zeros_like(rows_ME[:, 0])
    zeros = {"dropped_E": experts, "tokens_M": modalities, "unrouted_M": modalities}
    given = {name: np.array(value) for name, value in counts.items() if name != "entropy"}
    fields: dict[str, Any] = {**zeros, "rows_R": rows_ME.sum(keepdims=True)[0], **given}
    return LayerLoad(rows_ME, **fields, entropy=counts.get("entropy", 0.0))


def copied(parts: dict[str, Part]) -> dict[str, Tensor]:
    return {name: part.tensor.clone() for name, part in parts.items()}


def weights(model: ParallelModel) -> dict[str, Tensor]:
    """Copies of this rank's weights, by name."""
    return copied(model_parts(model))


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of this rank's weights and optimizer moments, by name."""
    model, optimizer = trainer.model, trainer.optimizer
    return copied({**model_parts(model), **optimizer_parts(model, optimizer)})


def bits_differ(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> list[str]:
    """Names whose bits are not the same."""
    assert ours.keys() == truth.keys() and ours
    return [name for name in ours if not same_bits(ours[name], truth[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest value of the truth."""
    assert ours.shape == truth.shape
    scale = float(truth.abs().max())
    return float((ours - truth).abs().max()) / (scale or 1.0)
