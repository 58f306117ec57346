"""The training run whose numbers every layout must reproduce, and the same run by the book.

A dense layer first and one in the middle; experts, one of which stays empty, with shared ones, a
shared gate, capacity, jitter, balance and z losses; text and images in one batch, padding, packed
documents; clipping that bites.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from coterie.comm.axis import Axes
from coterie.data import IGNORE, IMAGE, TEXT, Sampler, each_row, open_dataset, write_dataset
from coterie.launch.config import RunConfig
from coterie.models import Decoder, initialise
from coterie.moe.routers.top_k import TopKRouter
from coterie.moe.stats import RoutingStats
from coterie.parallel.micro_batch import token_info
from coterie.parallel.optimizer import learning_rate
from tests.parallel.tiny import SEQUENCE, VOCABULARY

EMPTY = 5
"""An expert that no token chooses."""
CLIP = 0.2
STEPS = 3
Result = dict[str, Any]


def write_documents(path: Path, rows: int = 40, held_out: int = 7) -> Path:
    """Rows of two documents, text or text with an image inside, and padding of many lengths."""
    gen = np.random.default_rng(0)
    with write_dataset(path, VOCABULARY, SEQUENCE, {}) as writer:
        for split, count in (("train", rows), ("held_out", held_out)):
            for number in range(2 * count):
                text = gen.integers(97, 107, gen.integers(11, 15) - 6 * (number % 2))
                image = VOCABULARY.captioned(gen.integers(0, 3, (2, 2)), "a")
                writer.add(split, VOCABULARY.join([text, image] if number % 2 else [text]))
    return path


def config_of(
    data: Path,
    parallel: dict[str, Any] | None = None,
    recompute: str = "none",
    batch: int = 16,
    accumulation: int = 4,
    layers: int = 6,
) -> RunConfig:
    """``batch``, ``accumulation``, ``layers``: they alone fix the numbers."""
    return RunConfig.model_validate(
        {
            "model": {
                "vocabulary": VOCABULARY.size,
                "width": 16,
                "layers": layers,
                "attention": {
                    "heads": 8,
                    "kv_heads": 4,
                    "head_width": 2,
                    "qk_norm": True,
                    "within_documents": True,
                },
                "feed_forward": {"hidden": 16},
                "moe": {
                    "experts": {"count": 8, "hidden": 8},
                    "router": {
                        "k": 2,
                        "jitter": 0.1,
                        "capacity_factor": 1.1,
                        "balance_loss": 0.3,
                        "z_loss": 0.1,
                    },
                    "shared": {"hidden": 8},
                    "shared_gate": True,
                },
                "dense_layers": dense_layers(layers),
            },
            "data": {"path": str(data), "sequence": SEQUENCE},
            "train": {
                "steps": STEPS,
                "global_batch": batch,
                "accumulation": accumulation,
                "precision": "fp64",
                "recompute": recompute,
                "seed": 3,
            },
            "optimizer": {"lr": 1e-2, "warmup": 0, "betas": (0.7, 0.8), "clip": CLIP},
            "parallel": parallel or {},
            "checkpoint": {"every": 0},
            "evaluation": {"batch": 8},
        }
    )


def dense_layers(layers: int) -> list[int]:
    """The first and one in the middle; of three the middle alone, for the sake of time."""
    return [0, layers // 2] if layers > 3 else [layers // 2]


@torch.no_grad()
def prepare(model: nn.Module, seed: int, residual_branches: int) -> None:
    """The initial weights, with strong routing, and one expert that the pairs (w, -w) of others
    always beat."""
    initialise(model, seed, residual_branches)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.weight.mul_(30)
            for one, other in ((0, 1), (2, 3), (4, 6)):
                module.weight[other] = -module.weight[one]
            module.weight[EMPTY] = 0


def prepared() -> Any:
    """While it lasts, models of the runtime start from :func:`prepare`."""
    return patch("coterie.parallel.model.initialise", prepare)


def sampler_of(config: RunConfig) -> Sampler:
    dataset = open_dataset(str(config.data.path))
    return Sampler(dataset, config.train.global_batch, config.train.seed)


def plain_run(config: RunConfig) -> list[Result]:
    """The steps by the book, in one process and float64: autograd, torch's clipping and AdamW."""
    model = Decoder(config.model).double()
    prepare(model, config.train.seed, 2 * config.model.layers)
    sampler, seed, settings = sampler_of(config), config.train.seed, config.optimizer
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    parts = config.train.accumulation
    results = []
    for number in range(config.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, config.train.steps, settings)
        batches = [sampler.batch(number, micro, parts) for micro in range(parts)]
        count = sum(int((batch.targets_BS != IGNORE).sum()) for batch in batches)
        optimizer.zero_grad()
        numbers = {"loss": 0.0, "balance": 0.0, "z": 0.0}
        stats: dict[int, RoutingStats] = {}
        for batch in batches:
            output = model(batch.tokens_BS, token_info(batch, Axes(), seed))
            chosen = output.x.log_softmax(-1)[batch.targets_BS != IGNORE]
            targets = batch.targets_BS[batch.targets_BS != IGNORE]
            entropy = -chosen[torch.arange(len(targets)), targets].sum() / count
            (entropy + sum(output.losses.values()) / parts).backward()
            numbers["loss"] += entropy.item()
            for name, loss in output.losses.items():
                numbers[name] += loss.item() / parts
            for layer, seen in output.stats.items():
                stats[layer] = stats[layer] + seen if layer in stats else seen
        before = gradients_of(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        after = gradients_of(model)
        optimizer.step()
        results.append(
            {
                "numbers": {**numbers, "norm": float(norm)},
                "load": {n: s.load_E.tolist() for n, s in stats.items()},
                "dropped": {n: int(s.dropped_E.sum()) for n, s in stats.items()},
                "entropy": {n: float(s.entropy / s.tokens) for n, s in stats.items()},
                "tokens": sum(int((~b.padding_BS).sum()) for b in batches),
                "gradients": before,
                "clipped": after,
                "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
            }
        )
    results[-1]["evaluation"] = plain_evaluation(model, config)
    return results


def write_truth(config: RunConfig, file: Path) -> None:
    """Keep the plain run of ``config`` in ``file``."""
    torch.save(plain_run(config), file)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@torch.no_grad()
def plain_evaluation(model: Decoder, config: RunConfig) -> dict[str, float]:
    """Held-out loss, whole and by the modality of the target, row by row."""
    model.eval()
    dataset = open_dataset(str(config.data.path), "held_out")
    sums: dict[int, list[float]] = {TEXT: [], IMAGE: []}
    for batch in each_row(dataset, 1):
        logits = model(batch.tokens_BS, token_info(batch, Axes())).x.log_softmax(-1)[0]
        for position, target in enumerate(batch.targets_BS[0].tolist()):
            if target != IGNORE:
                modality = int(dataset.vocabulary.modality(torch.tensor(target)))
                sums[modality].append(-float(logits[position, target]))
    whole = sums[TEXT] + sums[IMAGE]
    return {
        "loss": sum(whole) / len(whole),
        "loss/text": sum(sums[TEXT]) / len(sums[TEXT]),
        "loss/image": sum(sums[IMAGE]) / len(sums[IMAGE]),
    }
