"""A number that is not finite ends the run on every rank, before the weights are touched."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from coterie.models.depths import BlockOutput
from coterie.parallel import checkpoint_tensors, finite, step
from coterie.parallel.checkpoint import latest
from coterie.parallel.finite import NonFiniteError
from coterie.parallel.trainer import Trainer
from tests.distributed import run_ranks
from tests.parallel.tiny import (
    bits_differ,
    checkpointer_of,
    decoder_of,
    join,
    same_bits,
    state_of,
    tiny_config,
    trainer_of,
)

BAD_STEP = 4  # a checkpoint is saved after step 3
Plant = Callable[[Trainer], None]


def at_bad_step(trainer: Trainer) -> bool:
    return trainer.step == BAD_STEP - 1


def block(trainer: Trainer, layer: int) -> Any:
    return decoder_of(trainer.model).blocks[str(layer)]


def hook(trainer: Trainer, layer: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change what ``layer`` puts out, from the bad step on."""

    def changed(_module: Any, _inputs: Any, output: BlockOutput) -> BlockOutput:
        return output._replace(x=change(output.x)) if at_bad_step(trainer) else output

    block(trainer, layer).register_forward_hook(changed, prepend=True)


def plant_in_activation(trainer: Trainer) -> None:
    def spoil(x_BSD: Tensor) -> Tensor:
        mask = torch.zeros_like(x_BSD, dtype=torch.bool)
        mask[0, 3, 5] = True
        return x_BSD.masked_fill(mask, float("nan"))

    hook(trainer, 1, spoil)


def plant_in_weight(trainer: Trainer) -> None:
    experts = block(trainer, 1).moe.experts

    def spoil(*_: Any) -> None:
        if at_bad_step(trainer):
            with torch.no_grad():
                experts.w_out_EFD[:, 2, 3] = float("inf")  # one of them has rows

    decoder_of(trainer.model).register_forward_pre_hook(spoil)


def plant_in_loss(trainer: Trainer) -> None:
    """The loss alone: its gradient stays finite."""

    def spoilt(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(*args: Any) -> Tensor:
            value = right(*args)
            return value + float("nan") if at_bad_step(trainer) else value

        return loss

    patch.object(step, "cross_entropy", spoilt(step.cross_entropy)).start()


class _BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dy = dy.clone()
        dy[0, 2, 1] = float("inf")
        return dy


def plant_in_backward(trainer: Trainer) -> None:
    hook(trainer, 1, _BadBackward.apply)


def plant_in_expert_gradient(trainer: Trainer) -> None:
    """One expert's weight gradient overflows; no token's gradient does."""
    weight = block(trainer, 2).moe.experts.w_in_EPFD
    weight.register_hook(lambda g: g * float("inf") if at_bad_step(trainer) else g)


def plant_in_sum(trainer: Trainer) -> None:
    """Finite on every rank; only the sum over ranks is not."""
    right = step.sum_gradients

    def overflowing(model: Any) -> None:
        right(model)
        if at_bad_step(trainer):
            dict(model.named())["head.weight"].grad[0, 0] = float("inf")

    patch.object(step, "sum_gradients", overflowing).start()


LOSS, NORM = "the loss is (nan|inf)", "the gradient norm is (nan|inf)"
CASES: dict[str, tuple[Plant, str]] = {
    "activation": (
        plant_in_activation,
        f"{LOSS}; first seen in the forward pass at layer 1 on rank 1;",
    ),
    # the tokens of any rank may pass a spoilt expert
    "weight": (
        plant_in_weight,
        f"{LOSS}; first seen in the forward pass at (layer 1 on rank 0, )?layer 1 on rank 1;",
    ),
    "loss": (plant_in_loss, f"{LOSS}; first seen in the forward pass at the loss on rank 1;"),
    "backward": (
        plant_in_backward,
        f"{NORM}; first seen in the backward pass at layer 1 on rank 1;",
    ),
    "expert gradient": (
        plant_in_expert_gradient,
        f"{NORM}; first seen in the backward pass at layer 2 on rank 1;",
    ),
    "sum": (plant_in_sum, f"{NORM}; it overflowed only in the sum over ranks;"),
}


def ready(world: int, data: Path, folder: Path, recompute: str = "none", every: int = 3) -> Trainer:
    config = tiny_config(
        data,
        train={"steps": 6, "global_batch": 4, "recompute": recompute},
        checkpoint={"every": every},
    )
    ranks = join(world, world)
    return trainer_of(config, ranks, checkpointer_of(config, folder, ranks), [])


def run_into_it(trainer: Trainer, folder: Path) -> str:
    """The error's sentence, after checking that the weights and moments are those before."""
    before: dict[str, Tensor] = {}
    optimizer_step = trainer.optimizer.step

    def step_and_copy(*args: Any) -> Any:
        result = optimizer_step(*args)
        before.update(state_of(trainer))
        return result

    with (
        patch.object(trainer.optimizer, "step", step_and_copy),
        trainer.checkpointer,
        pytest.raises(NonFiniteError) as raised,
    ):
        trainer.run(folder)
    after = state_of(trainer)
    changed = bits_differ(after, before)
    assert all("experts.w_out_EFD" in name for name in changed)  # where one was planted
    assert trainer.step == BAD_STEP - 1, str(raised.value)
    return str(raised.value)


def on_rank(rank: int, kinds: list[tuple[str, str]], data: Path, folder: Path) -> list[Any]:
    told = []
    for kind, recompute in kinds:
        run = folder / f"{kind} {recompute}"
        trainer = ready(2, data, run, recompute)
        if rank == 1 or kind == "sum":
            CASES[kind][0](trainer)
        weight = block(trainer, 1).attention.q.weight
        text = run_into_it(trainer, run)
        patch.stopall()
        told.append((text, weight.detach().isfinite().all().item()))
    return told


KINDS = [(kind, "none") for kind in CASES] + [("activation", "full"), ("backward", "full")]


@pytest.fixture(scope="module")
def told(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """What each of two ranks said, by (case, recompute)."""
    folder = tmp_path_factory.mktemp("finite")
    by_rank = run_ranks(2, on_rank, KINDS, data, folder, timeout=120)
    return dict(zip(KINDS, zip(*by_rank, strict=True), strict=True))


@pytest.mark.parametrize(
    "case", KINDS, ids=lambda c: f"{c[0]}{' recomputed' if c[1] == 'full' else ''}"
)
def test_every_rank_names_rank_layer_step_and_checkpoint(
    case: tuple[str, str], told: dict[tuple[str, str], Any]
) -> None:
    (first, sound), (second, also_sound) = told[case]
    assert first == second
    assert sound and also_sound
    pattern = CASES[case[0]][1]
    assert re.match(rf"step {BAD_STEP}: {pattern} the weights were not changed; ", first), first
    assert re.search(r"the last good checkpoint in .*/checkpoints: step 3$", first), first


def test_one_process_alone(data: Path, tmp_path: Path) -> None:
    trainer = ready(1, data, tmp_path, every=0)
    plant_in_backward(trainer)
    text = run_into_it(trainer, tmp_path)
    assert "in the backward pass at layer 1 on rank 0" in text
    assert text.endswith("checkpoints: none was saved yet")
    assert latest(tmp_path / "checkpoints") is None


def while_saving(rank: int, data: Path, folder: Path) -> Any:
    """Rank 0 still writes the checkpoint of step 3 when step 4 goes wrong."""
    trainer = ready(2, data, folder)
    if rank == 1:
        plant_in_activation(trainer)
    write = checkpoint_tensors.write_safetensors
    diagnosed = threading.Event()
    was_late = []

    def late(*args: Any) -> Any:
        if rank == 0 and at_bad_step(trainer):
            was_late.append(diagnosed.wait(20))
        return write(*args)

    diagnose = finite._origin

    def origin(found: Any) -> str:
        time.sleep(0.05)
        diagnosed.set()
        return diagnose(found)

    with (
        patch.object(checkpoint_tensors, "write_safetensors", late),
        patch.object(finite, "_origin", origin),
    ):
        return run_into_it(trainer, folder), was_late


def test_it_does_not_meet_the_checkpoint_being_saved(data: Path, tmp_path: Path) -> None:
    """The background save and the search for the culprit use different groups."""
    (first, was_late), (second, _) = run_ranks(2, while_saving, data, tmp_path, timeout=40)
    assert was_late == [True]
    assert first == second
    assert "layer 1 on rank 1" in first and first.endswith("step 3")
    saved = latest(tmp_path / "checkpoints")
    assert saved is not None and saved.name == "step_00000003"


def test_same_bits_tells_apart_what_equal_does_not() -> None:
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
