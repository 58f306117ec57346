"""Muon: the library's on every matrix of a stack, and which parameters are whose."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from coterie.core.box import Box
from coterie.core.errors import UserError
from coterie.launch.config import RunConfig
from coterie.models import Decoder
from coterie.parallel.config import OptimizerConfig
from coterie.parallel.muon import COEFFICIENTS, STEPS, Scale, orthogonalised, rate, takes
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.part import Part
from coterie.parallel.placement import Place
from coterie.parallel.run_state import model_parts, optimizer_parts
from tests.distributed import run_ranks
from tests.moe.tiny import randn
from tests.parallel.planner.saved import model_config
from tests.parallel.tiny import (
    ALONE,
    checkpointer_of,
    join,
    relative_error,
    state_of,
    tiny_config,
    trainer_of,
)

STEPS_OF_RUN, HALF = 4, 2

SHAPES = [(3, 5), (5, 3), (4, 4), (3, 2, 4, 7), (2, 7, 4)]


def in_double() -> Any:
    """The library's iteration without its rounding to bfloat16."""
    return patch.object(Tensor, "bfloat16", Tensor.clone)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_matrix_of_a_stack_is_made_orthogonal_by_itself(shape: tuple[int, ...]) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    x_NAB = randn(*shape, seed=1)
    ours = orthogonalised(x_NAB)
    matrices = x_NAB.reshape(-1, *shape[-2:])
    with in_double():
        right = [_zeropower_via_newtonschulz(m, COEFFICIENTS, STEPS, 1e-7) for m in matrices]
    assert relative_error(ours, torch.stack(right).view(shape)) < 1e-12
    values = torch.linalg.svdvals(ours)
    assert 0.68 < float(values.min()) and float(values.max()) < 1.135  # .6818 and 1.1343 were seen
    if len(shape) > 2:  # not as one tall matrix
        assert relative_error(ours, orthogonalised(x_NAB.flatten(0, -2)).view(shape)) > 0.1


def test_a_matrix_without_gradient_is_not_moved() -> None:
    x_NAB = randn(3, 4, 5, seed=1)
    x_NAB[1] = 0
    assert not orthogonalised(x_NAB)[1].any()
    assert not orthogonalised(torch.zeros(0, 4, 5)).numel()


class _Net(nn.Module):
    """What the optimizer sees of a parallel model; nothing is split."""

    named = nn.Module.named_parameters
    ranks = SimpleNamespace(groups={})

    def __init__(self) -> None:
        super().__init__()
        shapes = {"embedding": (7, 4), "w_in": (6, 4), "experts": (3, 2, 6, 4), "gain": (4,)}
        shapes |= {".w_out_FD": (6, 4), "head": (7, 4)}
        for name, shape in shapes.items():
            weight = nn.Module()
            weight.weight = nn.Parameter(randn(*shape, seed=len(name)))
            self.add_module(name.replace(".", "block_"), weight)

    @property
    def places(self) -> dict[str, Place]:
        boxes = {name: Box.all_of(tuple(p.shape)) for name, p in self.named_parameters()}
        return {name: Place(box, False, False, True) for name, box in boxes.items()}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_adamw", "original"])
def test_three_steps_are_the_librarys(scale: Scale, nesterov: bool) -> None:
    net, twin = _Net(), _Net()
    settings = OptimizerConfig(
        kind="muon", lr=0.1, weight_decay=0.3, momentum=0.8, nesterov=nesterov, muon_scale=scale
    )
    ours = Optimizer(net, settings)
    library = "match_rms_adamw" if scale == "match_adamw" else "original"
    whole = dict(twin.named_parameters())
    of_muon = {
        f"{name}/{n}": nn.Parameter(matrix.detach())  # shares the twin's memory
        for name in ("w_in.weight", "experts.weight", "block_w_out_FD.weight")
        for n, matrix in enumerate(whole[name].view(-1, *whole[name].shape[-2:]))
    }
    muon = torch.optim.Muon(
        of_muon.values(),
        lr=0.1,
        weight_decay=0.3,
        momentum=0.8,
        nesterov=nesterov,
        adjust_lr_fn=library,
    )
    rest = {n: p for n, p in whole.items() if n.split(".")[0] in ("embedding", "head", "gain")}
    adamw = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.3 * (p.dim() > 1)} for p in rest.values()],
        lr=0.1,
        betas=settings.betas,
    )
    for step in range(3):
        ours.lr = 0.1 / (step + 1)
        for theirs in (muon, adamw):
            for group in theirs.param_groups:
                group["lr"] = 0.1 / (step + 1)
        for name, p in net.named_parameters():
            p.grad = randn(*p.shape, seed=step + 10 * len(name))
            if name in rest:
                rest[name].grad = p.grad.clone()
                continue
            for n, matrix in enumerate(p.grad.view(-1, *p.shape[-2:])):
                of_muon[f"{name}/{n}"].grad = matrix.clone()
        with in_double():
            muon.step()
        adamw.step()
        ours.step()
        for name, p in net.named_parameters():
            assert relative_error(p.detach(), whole[name].detach()) < 1e-12, (step, name)


def test_which_parameters_are_whose() -> None:
    config = model_config(
        attention={"heads": 4, "qk_norm": True, "gate": "head"},
        moe={
            "experts": {"count": 8, "hidden": 48},
            "router": {"k": 2},
            "shared": {"hidden": 40},
            "shared_gate": True,
        },
    )
    with torch.device("meta"):
        model = Decoder(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    adamws = {name for name, shape in shapes.items() if not takes(name, shape)}
    vectors = {name for name in shapes if "norm" in name or "shared_gate" in name}
    assert adamws == {"embedding.weight", "head.weight"} | vectors


def test_the_rates_factor() -> None:
    """A matrix that is stored inputs × outputs is scaled as its transpose."""
    assert rate("blocks.0.attention.q.weight", (8, 2), "original") == 2
    assert rate("blocks.0.attention.q.weight", (2, 8), "original") == 1
    assert rate("blocks.0.feed_forward.w_out_FD", (2, 8), "original") == 2
    assert rate("blocks.0.moe.experts.w_out_EFD", (9, 2, 8), "original") == 2
    assert rate("blocks.0.moe.experts.w_in_EPFD", (9, 2, 8, 2), "original") == 2
    for shape in ((3, 25, 4), (4, 25)):
        assert rate("x", shape, "match_adamw") == pytest.approx(1.0)


def _config(data: Path) -> RunConfig:
    return tiny_config(
        data,
        model={"attention": {"heads": 2}},
        optimizer={"kind": "muon", "lr": 1e-2, "eps": 1e-3, "warmup": 2},
        train={"steps": STEPS_OF_RUN},
        checkpoint={"every": HALF},
    )


def _resumed(rank: int, data: Path, folder: Path) -> dict[str, Part]:
    """This rank's parts at the end of a run that goes on from one process's middle checkpoint."""
    ranks, config = join(2, tp=2, etp=2), _config(data)
    with checkpointer_of(config, folder / "two", ranks) as checkpointer:
        trainer = trainer_of(config, ranks, checkpointer, [])
        trainer.restore(folder / "one" / "checkpoints" / f"step_{HALF:08d}")
        assert trainer.run(folder / "two").finished
        parts = {**model_parts(trainer.model), **optimizer_parts(trainer.model, trainer.optimizer)}
    return {name: Part(part.tensor.clone(), part.box) for name, part in parts.items()}


def test_a_checkpoint_goes_on_in_another_layout(data: Path, tmp_path: Path) -> None:
    config = _config(data)
    with checkpointer_of(config, tmp_path / "one", ALONE) as checkpointer:
        trainer = trainer_of(config, ALONE, checkpointer, [])
        trainer.run(tmp_path / "one")
        truth = state_of(trainer)
    momenta = [name for name in truth if name.endswith(".momentum")]
    assert len(momenta) > 10 and not [name for name in truth if "q.weight.exp_avg" in name]
    for parts in run_ranks(2, _resumed, data, tmp_path):
        assert parts.keys() == truth.keys()
        for name, part in parts.items():
            assert relative_error(part.tensor, truth[name][part.box.slices]) < 1e-9, name


def test_another_optimizers_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    config = _config(data)
    with checkpointer_of(config, tmp_path, ALONE) as checkpointer:
        trainer = trainer_of(config, ALONE, checkpointer, [])
        trainer.run(tmp_path)
        adamw = config.model_copy(update={"optimizer": OptimizerConfig(warmup=2)})
        other = trainer_of(adamw, ALONE, checkpointer, [])
        with pytest.raises(UserError, match="has no tensor 'optimizer"):
            other.restore(tmp_path / "checkpoints" / f"step_{HALF:08d}")
