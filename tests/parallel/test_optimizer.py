"""The learning rate, which parameters decay, and AdamW by its equations."""

import math

import pytest
import torch
from torch import nn

from coterie.core.box import Box
from coterie.parallel.config import OptimizerConfig
from coterie.parallel.optimizer import Optimizer, learning_rate
from coterie.parallel.placement import Place
from tests.parallel.tiny import relative_error


def test_the_rate_warms_up_then_falls_along_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, final_lr=0.25, warmup=4)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    for step in range(4, 20):
        half_wave = math.cos(math.pi * (step - 4) / 16)
        assert rates[step] == pytest.approx(0.5 + 1.5 * (1 + half_wave) / 2, rel=1e-12)
    assert rates[12] == pytest.approx(1.25)  # half-way
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(20, 20, config) == pytest.approx(0.5)
    assert learning_rate(99, 20, config) == pytest.approx(0.5)


@pytest.mark.parametrize("warmup", [0, 7, 20])
def test_the_rate_is_defined_at_every_step(warmup: int) -> None:
    config = OptimizerConfig(lr=1.0, warmup=warmup)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == rates[max(0, warmup - 1)] == 1


class _Model(nn.Module):
    """The part of a parallel model that the optimizer sees; nothing is split."""

    named = nn.Module.named_parameters

    @property
    def places(self) -> dict[str, Place]:
        boxes = {name: Box.all_of(tuple(p.shape)) for name, p in self.named()}
        return {name: Place(box, False, False, True) for name, box in boxes.items()}


class _Net(_Model):
    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=gen, dtype=torch.float64))

        self.stacked = parameter(2, 3, 4)
        self.matrix = parameter(4, 3)
        self.gain = parameter(5)


CONFIG = OptimizerConfig(lr=0.1, betas=(0.6, 0.7), eps=1e-3, weight_decay=0.3, warmup=0)


def test_adamw_follows_its_equations() -> None:
    """Loshchilov & Hutter, arXiv 1711.05101, algorithm 2, with a rate that changes."""
    net = _Net()
    optimizer = Optimizer(net, CONFIG)
    gen = torch.Generator().manual_seed(2)
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    beta1, beta2 = CONFIG.betas
    for step in range(3):
        rate = learning_rate(step, 3, CONFIG)
        optimizer.lr = rate
        assert optimizer.lr == rate
        for name, p in net.named_parameters():
            gradient = torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.grad = gradient.clone()
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            mean = first[name] / (1 - beta1 ** (step + 1))
            root = (second[name] / (1 - beta2 ** (step + 1))).sqrt()
            decay = 0.0 if name == "gain" else CONFIG.weight_decay
            expected[name] = expected[name] * (1 - rate * decay)
            expected[name] = expected[name] - rate * mean / (root + CONFIG.eps)
        optimizer.step()
        for name, p in net.named_parameters():
            assert relative_error(p.detach(), expected[name]) < 1e-12, (step, name)


def test_gains_do_not_decay() -> None:
    net = _Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    Optimizer(net, CONFIG).step()
    after = dict(net.named_parameters())
    assert torch.equal(after["gain"], before["gain"])
    for name in ("stacked", "matrix"):
        torch.testing.assert_close(after[name].detach(), before[name] * (1 - 0.1 * 0.3))


def test_a_model_without_vectors_has_one_group() -> None:
    net = _Model()
    net.matrix = nn.Parameter(torch.zeros(3, 2))
    groups = Optimizer(net, CONFIG).adamw.param_groups
    assert [len(group["params"]) for group in groups] == [1]


def test_dropped_gradients_change_nothing() -> None:
    net = _Net()
    optimizer = Optimizer(net, CONFIG)
    before = {name: p.detach().clone() for name, p in net.named()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    optimizer.step()
    for name, p in net.named():
        assert torch.equal(p.detach(), before[name])
