"""MoMa's experts of modalities: cost, any number of modalities, ranks that lack one."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from coterie.comm.axis import Axes, expert_parallel
from coterie.moe.experts import ExpertsConfig
from coterie.moe.feed_forward import FeedForward, FeedForwardConfig
from coterie.moe.layer import MoEConfig, MoELayer
from coterie.moe.routers.modality import ModalityConfig
from coterie.moe.tokens import TokenInfo
from tests.distributed import run_ranks
from tests.moe.tiny import error, randn, randomise, tiny_layer

D, F = 6, 5


def _layer(experts: tuple[int, ...], axes: Axes = Axes()) -> MoELayer:
    config = MoEConfig(
        experts=ExpertsConfig(count=sum(experts), hidden=F),
        router=ModalityConfig(experts=experts, noise=False),
    )
    layer = MoELayer(D, config, axes).double()
    randomise(layer)
    return layer


def test_each_modality_takes_as_many_rows_as_it_has_tokens() -> None:
    """Σ k_e = b_M, where the experts divide b_M."""
    layer = _layer((4, 2, 3))
    modality_T = torch.tensor([0] * 8 + [1] * 4 + [2] * 9)
    load_E = layer.router(randn(21, D, seed=0), TokenInfo(modality_T=modality_T)).assignment.load_E
    modality_E = torch.tensor(layer.router.groups)
    assert [int(load_E[modality_E == m].sum()) for m in range(3)] == [8, 4, 9]


def test_the_experts_cost_what_a_dense_layer_does() -> None:
    """Multiplications of a forward pass, counted by torch; the router adds 2·D·E for each token."""
    tokens, experts = 24, (4, 2)
    layer = _layer(experts)
    dense = FeedForward(D, FeedForwardConfig(hidden=F)).double()
    randomise(dense)
    x_TD = randn(tokens, D, seed=1)
    info = TokenInfo(modality_T=torch.tensor([0] * 16 + [1] * 8))

    def flops(run: object) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert callable(run)
            run()
        return counter.get_total_flops()

    router = 2 * tokens * D * sum(experts)
    assert flops(lambda: layer.router(x_TD, info)) == router
    assert flops(lambda: layer(x_TD, info)) == flops(lambda: dense(x_TD)) + router > router


def test_three_modalities_do_not_see_each_other() -> None:
    """Each is as a layer that has its experts and its tokens alone."""
    experts = (2, 1, 3)
    layer = _layer(experts)
    modality_E = torch.tensor(layer.router.groups)
    x_TD = randn(30, D, seed=2)
    modality_T = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(2))
    padding_T = torch.rand(30, generator=torch.Generator().manual_seed(3)) < 0.2
    y_TD = layer(x_TD, TokenInfo(modality_T=modality_T, padding_T=padding_T)).y
    for modality, count in enumerate(experts):
        alone = _layer((count,))
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(layer.get_parameter(name)[modality_E == modality])
        mine_T = (modality_T == modality) & ~padding_T
        info = TokenInfo(modality_T=torch.zeros(int(mine_T.sum()), dtype=torch.int64))
        assert error(y_TD[mine_T], alone(x_TD[mine_T], info).y) < 1e-13
        assert bool(y_TD[mine_T].any())
    assert not y_TD[padding_T].any()


def test_an_expert_takes_the_floor_of_its_share_but_one_at_least() -> None:
    layer = _layer((4, 4))
    for text, image, rows in ((7, 3, [1, 1]), (8, 11, [2, 2]), (0, 1, [0, 1])):
        info = TokenInfo(modality_T=torch.tensor([0] * text + [1] * image))
        load_E = layer.router(randn(text + image, D, seed=4), info).assignment.load_E
        modality_E = torch.tensor(layer.router.groups)
        for modality in (0, 1):
            assert set(load_E[modality_E == modality].tolist()) == {rows[modality]}


def test_padding_does_not_compete() -> None:
    """More of it, with any activations, changes nothing."""
    layer = tiny_layer(ModalityConfig(experts=(2, 2)))
    modality_T = torch.tensor([0, 1] * 9)
    x_TD = randn(18, D, seed=5)
    y_TD = layer(x_TD, TokenInfo(modality_T=modality_T)).y
    longer_TD = torch.cat([x_TD, 100 * randn(40, D, seed=6)])
    info = TokenInfo(
        modality_T=torch.cat([modality_T, torch.ones(40, dtype=torch.int64)]),
        padding_T=torch.arange(58) >= 18,
    )
    padded_TD = layer(longer_TD, info).y
    assert error(padded_TD[:18], y_TD) < 1e-13 and not padded_TD[18:].any()


def _tokens(modality: int) -> tuple[Tensor, TokenInfo]:
    x_TD = randn(10, D, seed=7 + modality)
    return x_TD, TokenInfo(modality_T=torch.full((10,), modality))


def _results(layer: MoELayer, x_TD: Tensor, info: TokenInfo) -> list[Tensor]:
    y_TD = layer.train()(x_TD, info).y
    y_TD.square().sum().backward()
    grads = [p.grad for p in (layer.router.weight, *layer.experts.parameters())]
    assert all(grad is not None for grad in grads)
    return [y_TD.detach(), *grads]  # type: ignore[list-item]


def _on_rank(rank: int, given: list[int]) -> list[Tensor]:
    axes = expert_parallel(dist.group.WORLD)
    layer, whole = _layer((2, 2), axes), _layer((2, 2))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            truth = whole.get_parameter(name)
            parameter.copy_(truth.chunk(2)[rank] if name.startswith("experts.") else truth)
    return _results(layer, *_tokens(given[rank]))


def test_ranks_that_lack_a_modality_join_the_exchange() -> None:
    """One has text alone, the other images; or nobody has text."""
    for given in ([0, 1], [1, 1]):
        (first, second) = run_ranks(2, _on_rank, given)
        parts = [_tokens(modality) for modality in given]
        modality_T = torch.cat([info.modality_T for _, info in parts])  # type: ignore[misc]
        x_TD = torch.cat([x for x, _ in parts])
        truth = _results(_layer((2, 2)), x_TD, TokenInfo(modality_T=modality_T))
        assert error(torch.cat([first[0], second[0]]), truth[0]) < 1e-13
        assert error(first[1] + second[1], truth[1]) < 1e-13
        for ours, whole in zip(zip(first[2:], second[2:], strict=True), truth[2:], strict=True):
            assert error(torch.cat(ours), whole) < 1e-13
