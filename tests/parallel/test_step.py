"""What a step reports, and what its settings do to the numbers."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from coterie.comm.axis import Axes
from coterie.launch.config import RunConfig
from coterie.models import Decoder
from coterie.moe.routers.top_k import TopKRouter
from coterie.parallel.config import Precision
from coterie.parallel.gradients import sum_gradients
from coterie.parallel.micro_batch import token_info
from coterie.parallel.model import ParallelModel
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.precision import autocast, bf16_slowdown, parameter_dtype, resolve
from coterie.parallel.step import StepReport, StepSettings, train_step
from tests.parallel.tiny import (
    ALONE,
    SEQUENCE,
    VOCABULARY,
    decoder_of,
    load_of,
    model_of,
    relative_error,
    sampler_of,
    tiny_config,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def sharpened(model: ParallelModel) -> ParallelModel:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.weight.mul_(30)
    return model


def one_step(config: RunConfig, model: ParallelModel, clip: float | None = None) -> StepReport:
    """The first step; gradients stay in the parameters."""
    sampler, parts = sampler_of(config), config.train.accumulation
    optimizer = Optimizer(model, config.optimizer)
    optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
    settings = StepSettings(resolve(config.train.precision, CPU), clip, config.train.seed)
    batches = [sampler.batch(0, micro, parts) for micro in range(parts)]
    return train_step(model, optimizer, batches, 1, settings)


def gradients(model: ParallelModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named() if p.grad is not None}


def test_accumulation_does_not_change_the_gradients(data: Path) -> None:
    """Without router losses, which are means over micro-batches."""
    found = []
    for parts in (1, 2, 4, 8):
        config = tiny_config(
            data,
            train={"accumulation": parts, "steps": 3, "global_batch": 8, "precision": "fp64"},
            router={"balance_loss": 0, "z_loss": 0},
        )
        model = sharpened(model_of(config, ALONE))
        report = one_step(config, model)
        found.append((report.loss, report.grad_norm, report.load, gradients(model)))
    for loss, norm, load, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-13)
        assert norm == pytest.approx(found[0][1], rel=1e-12)
        assert load == found[0][2]
        assert grads.keys() == found[0][3].keys() and len(grads) == 41
        for name, gradient in grads.items():
            assert relative_error(gradient, found[0][3][name]) < 1e-12, name


@contextmanager
def watched_logits(model: Decoder) -> Iterator[dict[int, torch.Tensor]]:
    """The logits of each router in the last forward pass, jitter included."""
    logits: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        for layer in (1, 2):
            block: Any = model.blocks[str(layer)]

            def watch(*args: Any, right: Any = block.moe.router._logits, at: int = layer) -> Any:
                logits[at] = right(*args)
                return logits[at]

            stack.enter_context(patch.object(block.moe.router, "_logits", watch))
        yield logits


@torch.no_grad()
def counted_by_hand(config: RunConfig, model: Decoder) -> dict[int, dict[str, Any]]:
    """Loads, drops and entropies by plain loops over each sequence alone, from the logits."""
    sampler = sampler_of(config)
    seen: dict[int, dict[str, Any]] = {}
    for layer in (1, 2):
        seen[layer] = {"rows": [[0] * 8, [0] * 8], "dropped": [0] * 8, "entropy": []}
        seen[layer] |= {"tokens": [0, 0], "unrouted": [0, 0]}
    with watched_logits(model) as logits:
        for place in range(8):
            batch = sampler.batch(0, place, config.train.global_batch)
            model(batch.tokens_BS, token_info(batch, Axes(), config.train.seed))
            tokens = [t for t, pad in enumerate(batch.padding_BS[0].tolist()) if not pad]
            capacity, modality = math.ceil(len(tokens) * 2 / 8), batch.modality_BS[0].tolist()
            for layer, found in seen.items():
                taken = [0] * 8
                for t in tokens:
                    rows = 0
                    prob = logits[layer][t].softmax(-1)
                    found["entropy"].append(-sum(p * p.log() for p in prob).item())
                    for expert in prob.argsort(descending=True)[:2].tolist():
                        if taken[expert] < capacity:
                            taken[expert] += 1
                            rows += 1
                            found["rows"][modality[t]][expert] += 1
                        else:
                            found["dropped"][expert] += 1
                    found["tokens"][modality[t]] += 1
                    found["unrouted"][modality[t]] += rows == 0
    return seen


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_routing_is_counted_once(accumulation: int, recompute: str, data: Path) -> None:
    config = tiny_config(
        data,
        train={
            "accumulation": accumulation,
            "recompute": recompute,
            "steps": 3,
            "global_batch": 8,
            "precision": "fp64",
        },
        router={"capacity_factor": 1.0},
    )
    model = sharpened(model_of(config, ALONE))
    by_hand = counted_by_hand(config, decoder_of(model))
    report = one_step(config, model)
    for layer, found in by_hand.items():
        load = report.layers[layer]
        assert load.rows_ME.tolist() == found["rows"]
        assert load.dropped_E.tolist() == found["dropped"]
        assert load.tokens_M.tolist() == found["tokens"]
        assert load.unrouted_M.tolist() == found["unrouted"]
        assert report.load[layer] == load.rows_E.tolist()
        assert report.dropped[layer] == sum(found["dropped"]) > 0 and load.unrouted > 0
        mean = sum(found["entropy"]) / len(found["entropy"])
        assert report.entropy[layer] == pytest.approx(mean, rel=1e-12)
        assert sum(report.load[layer]) + report.dropped[layer] == 2 * report.tokens


def test_token_facts_come_from_the_batch(data: Path) -> None:
    """Keys are those of (seed, sample, position): not of the place in a batch."""
    sampler = sampler_of(tiny_config(data))
    whole = sampler.batch(2)
    info = token_info(whole, Axes(), 3)
    assert info.modality_T is not None and info.padding_T is not None
    assert info.sequence_T is not None and info.document_T is not None
    assert torch.equal(info.modality_T.view(8, -1), whole.modality_BS)
    assert torch.equal(info.padding_T.view(8, -1), whole.tokens_BS == VOCABULARY.pad)
    assert torch.equal(info.document_T.view(8, -1), whole.segment_BS)
    assert info.sequence_T.tolist() == [row for row in range(8) for _ in range(SEQUENCE)]
    assert info.key_T is not None and info.key_T.unique().numel() == 8 * SEQUENCE
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    batches = [sampler.batch(2, micro, 2, rank, 2) for micro, rank in places]
    parts = [token_info(batch, Axes(), 3).key_T for batch in batches]
    assert torch.equal(torch.cat([part for part in parts if part is not None]), info.key_T)
    for other in (
        token_info(whole, Axes(), 4).key_T,
        token_info(sampler.batch(3), Axes(), 3).key_T,
    ):
        assert other is not None and not torch.isin(other, info.key_T).any()
    assert token_info(whole, Axes()).key_T is None


def report_with(load: dict[int, list[int]]) -> StepReport:
    layers = {layer: load_of([rows]) for layer, rows in load.items()}
    return StepReport(1, 1.0, {}, 1.0, 1.0, 1, layers, 1.0, False)


def test_skew_is_that_of_the_worst_layer() -> None:
    assert report_with({0: [4, 4, 4, 4]}).skew == 1
    assert report_with({0: [4, 4, 4, 4], 3: [6, 1, 2, 3]}).skew == 2
    assert report_with({0: [0, 0, 12], 3: [6, 1, 2, 3]}).skew == 3
    assert report_with({0: [2, 2], 1: [3, 1, 1, 1, 1, 1]}).skew == pytest.approx(18 / 8)
    assert report_with({}).skew == 1
    assert report_with({0: [0, 0]}).skew == 0


def test_clipping_scales_to_the_limit_or_leaves_alone(data: Path) -> None:
    config = tiny_config(data)
    free = model_of(config, ALONE)
    norm = one_step(config, free).grad_norm
    for limit in (norm / 3, norm * 3):
        model = model_of(config, ALONE)
        assert one_step(config, model, clip=limit).grad_norm == norm
        scale = min(1.0, limit / norm)
        for name, gradient in gradients(model).items():
            assert relative_error(gradient, gradients(free)[name] * scale) < 1e-5, name
        total = sum(float(g.square().sum()) for g in gradients(model).values()) ** 0.5
        assert total <= limit


def test_a_parameter_without_gradient_gets_zeros(data: Path) -> None:
    model = model_of(tiny_config(data), ALONE)
    embedding: Any = decoder_of(model).embedding
    embedding(torch.tensor([[3, 4]])).sum().backward()
    sum_gradients(model)
    found = gradients(model)
    assert len(found) == 41
    assert [name for name, gradient in found.items() if gradient.any()] == ["embedding.weight"]


# --- precision ----------------------------------------------------------------------------------


def test_auto_is_fp32_on_a_cpu_and_bf16_on_cuda() -> None:
    assert resolve("auto", CPU) == "fp32"
    assert resolve("auto", CUDA) == "bf16"
    fixed_ones: tuple[Precision, ...] = ("fp32", "bf16", "fp64")
    for fixed in fixed_ones:
        assert resolve(fixed, CPU) == resolve(fixed, CUDA) == fixed


def test_weights_are_double_only_in_fp64(data: Path) -> None:
    assert parameter_dtype("fp64") == torch.float64
    for precision in ("fp32", "bf16", "auto"):
        assert parameter_dtype(precision) == torch.float32
        model = model_of(tiny_config(data, train={"precision": precision, "steps": 3}), ALONE)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bf16_is_close_to_double_and_not_the_same(data: Path) -> None:
    reports, dtypes = {}, set()
    precisions: tuple[Precision, ...] = ("fp64", "fp32", "bf16")
    for precision in precisions:
        config = tiny_config(data, train={"precision": precision, "steps": 3}, router={"jitter": 0})
        model = model_of(config, ALONE)
        head: Any = decoder_of(model).head
        head.register_forward_hook(lambda _m, _i, out: dtypes.add(out.dtype))
        reports[precision] = one_step(config, model)
        assert {p.dtype for p in model.parameters()} == {parameter_dtype(precision)}
        assert {g.dtype for g in gradients(model).values()} == {parameter_dtype(precision)}
    assert dtypes == {torch.float64, torch.float32, torch.bfloat16}
    truth = reports["fp64"]
    assert reports["fp32"].loss == pytest.approx(truth.loss, rel=1e-5)
    assert reports["bf16"].loss == pytest.approx(truth.loss, rel=2e-2)
    assert abs(reports["bf16"].loss - truth.loss) > 2 * abs(reports["fp32"].loss - truth.loss)
    assert reports["bf16"].grad_norm == pytest.approx(truth.grad_norm, rel=0.1)


def test_autocast_only_for_bf16() -> None:
    x = torch.ones(2, 2)
    with autocast("bf16", CPU):
        assert (x @ x).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert (x @ x).dtype == torch.float32


def test_bf16_slowdown_is_measured() -> None:
    assert 0 < bf16_slowdown(size=16) < float("inf")
