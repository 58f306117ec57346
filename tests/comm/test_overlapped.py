"""The exchanges between ranks give what the plain one gives, in float64, whatever is late."""

import weakref
from collections.abc import Callable
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from coterie.comm.axis import expert_parallel
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.comm.exchange.base import Exchange
from coterie.comm.exchange.mail import Arrival, StreamMail, ThreadMail, mail_for
from coterie.comm.exchange.overlapped import OverlappedExchange
from coterie.comm.exchange.work import LocalWork
from coterie.moe.activations import ACTIVATIONS
from tests.comm.test_all_to_all import CASES, LIMIT, _inputs, _layer, _step
from tests.distributed import run_ranks
from tests.moe.tiny import error

MADE: dict[str, Callable[[ProcessGroup], Exchange]] = {
    "tokens": lambda group: AllToAllExchange(group, deduplicate=True),
    "one piece": lambda group: OverlappedExchange(group, pieces=1),
    "pieces": lambda group: OverlappedExchange(group, pieces=3),
    "slabs": lambda group: OverlappedExchange(group, pieces=1, slabs=3, ahead=1),
    "pieces and slabs": lambda group: OverlappedExchange(group, pieces=2, slabs=2, ahead=9),
    "streams": lambda group: by_streams(OverlappedExchange(group, pieces=3, slabs=2)),
    "pieces of tokens": lambda group: OverlappedExchange(
        group, deduplicate=True, pieces=2, slabs=2
    ),
    "rounds of tokens": lambda group: OverlappedExchange(group, 1.0, deduplicate=True, pieces=2),
    "rounds": lambda group: OverlappedExchange(group, 1.0, pieces=2),
}
BY_NODES: dict[str, Callable[[ProcessGroup, Exchange], Exchange]] = {
    "nodes": lambda across, inside: AllToAllExchange(across, deduplicate=True, onward=inside),
    "nodes, overlapped": lambda across, inside: OverlappedExchange(
        across, deduplicate=True, pieces=2, slabs=2, onward=inside
    ),
}


def by_streams(exchange: OverlappedExchange) -> OverlappedExchange:
    """Its messages go as they do with NCCL."""
    exchange.mail = StreamMail(exchange.meter)
    return exchange


def _everyone() -> ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _every_exchange(rank: int, world: int) -> dict[str, Exchange]:
    group = _everyone()
    made = {kind: make(group) for kind, make in MADE.items()}
    if world == 4:
        nodes = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        across = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        for kind, by_nodes in BY_NODES.items():
            inside = AllToAllExchange(nodes[rank // 2], 1.0, deduplicate=True)
            made[kind] = by_nodes(across[rank % 2], inside)
            rows = AllToAllExchange(nodes[rank // 2], deduplicate=True)
            made[f"{kind}, no rounds"] = by_nodes(across[rank % 2], rows)
    return made


def _compare(rank: int, world: int) -> dict[str, dict[str, float]]:
    made = _every_exchange(rank, world)
    errors: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        axes = expert_parallel(_everyone())
        arguments = _inputs(case, world)[rank]
        right = _step(_layer(case, axes), *arguments)
        for kind, exchange in made.items():
            ours = _layer(case, axes)
            ours.exchange = exchange
            found = _step(ours, *arguments)
            errors[f"{name}, {kind}"] = {what: error(found[what], right[what]) for what in right}
    return errors


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_plain_exchanges_numbers(world: int) -> None:
    for errors in run_ranks(world, _compare, world):
        for name, by_what in errors.items():
            assert max(by_what.values()) < LIMIT, (name, by_what)


def _twice(rank: int, world: int) -> dict[str, float]:
    """Errors of gradients that are made in two passes, as zero-bubble schedules do."""
    errors = {}
    x_TD, info, dy_TD = _inputs(CASES["uneven"], world)[rank]
    for kind, exchange in _every_exchange(rank, world).items():
        layer = _layer(CASES["uneven"], expert_parallel(_everyone()))
        layer.exchange = exchange
        x_TD.requires_grad_()
        weights = [layer.experts.w_in_EPFD, layer.experts.w_out_EFD]
        loss = (layer(x_TD, info).y * dy_TD).sum()
        right = torch.autograd.grad(loss, [x_TD, *weights], retain_graph=True)
        found = torch.autograd.grad(loss, [x_TD], retain_graph=True)
        found += torch.autograd.grad(loss, weights)
        errors[kind] = max(error(f, r) for f, r in zip(found, right, strict=True))
    return errors


def test_gradients_in_two_passes() -> None:
    for errors in run_ranks(4, _twice, 4):
        assert max(errors.values()) == 0, errors


def _in_some_order(rank: int, world: int) -> list[dict[str, Tensor]]:
    """The same step three times, with pieces that are late now and then."""
    results = []
    arguments = _inputs(CASES["every expert of every token"], world)[rank]
    layer = _layer(CASES["every expert of every token"], expert_parallel(_everyone()))
    layer.exchange = OverlappedExchange(_everyone(), pieces=3, slabs=2)
    for seed in range(3):
        draw, seen = Random(seed), []

        def late(arrival: Arrival, draw: Random = draw, seen: list[bool] = seen) -> bool:
            arrival.wait()  # so that it is for `draw` alone to say
            seen.append(draw.random() < 0.5)
            return seen[-1]

        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(Arrival, "ready", late)
            layer.zero_grad()
            results.append(_step(layer, *arguments))
        assert len(set(seen)) == 2
    return [{what: tensor.clone() for what, tensor in result.items()} for result in results]


def test_what_is_late_changes_no_bit() -> None:
    for first, *others in run_ranks(4, _in_some_order, 4):
        for other in others:
            assert all(torch.equal(other[what], first[what]) for what in first)


def _sent_in_rounds(rank: int, world: int) -> list[tuple[int, float]]:
    """By kind of exchange, alone and under a checkpoint: elements that go to other ranks in a step,
    and the largest error."""
    case, axes = CASES["all to one expert"], expert_parallel(_everyone())
    x_TD, _, dy_TD = _inputs(case, world)[rank]
    isend, sent = dist.isend, 0

    def counted(rows_AD: Tensor, **to: Any) -> Any:
        nonlocal sent
        sent += rows_AD.numel()
        return isend(rows_AD, **to)

    def step(exchange: Exchange, whole: bool) -> list[Tensor]:
        layer = _layer(case, axes)
        layer.exchange = exchange
        leaf_TD = x_TD.clone().requires_grad_()
        once = partial(checkpoint, layer, use_reentrant=False) if whole else layer
        once(leaf_TD).y.backward(dy_TD)
        gradients = (leaf_TD.grad, layer.experts.w_in_EPFD.grad, layer.router.weight.grad)
        return [gradient for gradient in gradients if gradient is not None]

    right = step(AllToAllExchange(_everyone()), False)
    found = []
    for kind in (AllToAllExchange, OverlappedExchange):
        for whole in (False, True):
            sent = 0
            with patch.object(dist, "isend", counted):
                ours = step(kind(_everyone(), 1.0), whole)
            found.append((sent, max(map(error, ours, right))))
    return found


def test_rounds_send_no_results_twice() -> None:
    """Where they run again, as much travels as with all-to-alls, the last of which is left out."""
    for alone, whole, *overlapped in run_ranks(4, _sent_in_rounds, 4):
        assert [sent for sent, _ in overlapped] == [alone[0], whole[0]]
        assert max(error for _, error in (alone, whole, *overlapped)) < LIMIT


def _most_kept(rank: int, world: int) -> int:
    """Of how many pieces parts of the weights' gradients are there at most, if nothing is late."""
    layer = _layer(CASES["every expert of every token"], expert_parallel(_everyone()))
    layer.exchange = OverlappedExchange(_everyone(), pieces=4)
    backward, most = LocalWork.backward, 0

    def noted(work: LocalWork, *given: Any) -> Any:
        nonlocal most
        slabs = backward(work, *given)
        most = max(most, sum(map(bool, work.later)))
        return slabs

    def there(arrival: Arrival) -> bool:
        arrival.wait()
        return True

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(LocalWork, "backward", noted)
        monkey.setattr(Arrival, "ready", there)
        _step(layer, *_inputs(CASES["every expert of every token"], world)[rank])
    return most


def test_few_pieces_keep_their_hidden_gradients() -> None:
    """Three that have come, which wait for the four of one's own, and one of these."""
    assert run_ranks(4, _most_kept, 4) == [4] * 4


def _alive_of_earlier_pieces(rank: int, world: int) -> list[int]:
    """How many other hidden activations are there when some are made, forward."""
    layer = _layer(CASES["every expert of every token"], expert_parallel(_everyone()))
    layer.exchange = OverlappedExchange(_everyone(), pieces=4, slabs=2)
    activation = ACTIVATIONS["swiglu"]
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def noted(h_AH: Tensor) -> Tensor:
        alive.append(sum(other() is not None for other in made))
        a_AF = activation.forward(h_AH)
        made.append(weakref.ref(a_AF))
        return a_AF

    x_TD, info, _ = _inputs(CASES["every expert of every token"], world)[rank]
    assignment = layer.router(x_TD, info).assignment
    with patch.dict(ACTIVATIONS, swiglu=activation._replace(forward=noted)):
        for training in (False, True):
            with torch.set_grad_enabled(training):
                layer.experts.over(layer.exchange, x_TD, assignment)
    return alive


def test_a_piece_is_gone_when_the_next_one_is_computed() -> None:
    for alive in run_ranks(2, _alive_of_earlier_pieces, 2):
        # two experts are a rank's: the first is there when the second is computed
        assert len(alive) >= 16 and max(alive) == 1


def _kept_without_gradients(rank: int, world: int) -> list[bool]:
    arguments = _inputs(CASES["uneven"], world)[rank]
    layer = _layer(CASES["uneven"], expert_parallel(_everyone()))
    layer.exchange = OverlappedExchange(_everyone())
    kept = []
    forward = LocalWork.forward

    def noted(work: LocalWork, *given: Any) -> Any:
        kept.append(given[-1])
        return forward(work, *given)

    with pytest.MonkeyPatch.context() as monkey, torch.no_grad():
        monkey.setattr(LocalWork, "forward", noted)
        layer(*arguments[:2])
    return kept


def test_evaluation_keeps_nothing() -> None:
    for kept in run_ranks(2, _kept_without_gradients, 2):
        assert kept and not any(kept)


def test_mail_is_made_for_the_device_of_the_rows() -> None:
    """A CUDA run's groups are of both backends: their name says nothing."""
    meter: Any = SimpleNamespace(group=None)
    assert isinstance(mail_for(torch.device("cuda", 1), meter, 2), StreamMail)
    assert isinstance(mail_for(torch.device("cpu"), meter, 2), ThreadMail)
