"""Every layout computes what one process computes: loss, gradients, norm, clipping, weights.

The truth is a plain loop in float64 over autograd, torch's own clipping and its AdamW. The
mutations at the end show that the comparison notices each reduction that is left out or wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.data import IGNORE
from coterie.launch.config import RunConfig
from coterie.models import Decoder
from coterie.moe.experts import Experts
from coterie.moe.routers.top_k import TopKRouter
from coterie.moe.stats import RoutingStats
from coterie.parallel import gradients, step
from coterie.parallel.distributed import Ranks
from coterie.parallel.micro_batch import token_info
from coterie.parallel.optimizer import build_optimizer, learning_rate
from coterie.parallel.step import StepSettings, train_step
from tests.distributed import run_ranks
from tests.parallel.tiny import (
    ALONE,
    join,
    model_of,
    relative_error,
    sampler_of,
    tiny_config,
    weights,
)

EMPTY = 5
"""An expert that no token chooses."""
CLIP = 0.2
TOLERANCE = 1e-9
Result = dict[str, Any]


def config_of(data: Path, recompute: bool = False) -> RunConfig:
    return tiny_config(
        data,
        train={
            "steps": 3,
            "global_batch": 8,
            "accumulation": 2,
            "precision": "fp64",
            "recompute": recompute,
        },
        optimizer={"lr": 1e-2, "warmup": 0, "betas": (0.7, 0.8), "clip": CLIP},
        router={"balance_loss": 0.3, "z_loss": 0.1, "capacity_factor": 1.1},
    )


def prepared_model(config: RunConfig, ranks: Ranks) -> Decoder:
    """With strong routing, and one expert that the pairs (w, -w) of others always beat."""
    model = model_of(config, ranks)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.weight.mul_(30)
                for one, other in ((0, 1), (2, 3), (4, 6)):
                    module.weight[other] = -module.weight[one]
                module.weight[EMPTY] = 0
    return model


def gradients_of(model: Decoder) -> dict[str, Tensor]:
    """Copies of this rank's gradients, by name; every parameter has one."""
    found = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def plain_run(config: RunConfig) -> list[Result]:
    """Three steps by the book, in one process."""
    model = prepared_model(config, ALONE)
    sampler, seed = sampler_of(config), config.train.seed
    optimizer_config = config.optimizer
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        betas=optimizer_config.betas,
        eps=optimizer_config.eps,
        weight_decay=optimizer_config.weight_decay,
    )
    results = []
    for number in range(config.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, config.train.steps, optimizer_config)
        batches = [sampler.batch(number, micro, 2) for micro in (0, 1)]
        count = sum(int((batch.targets_BS != IGNORE).sum()) for batch in batches)
        optimizer.zero_grad()
        entropies, router_losses = [], {"balance": 0.0, "z": 0.0}
        stats: dict[int, RoutingStats] = {}
        for batch in batches:
            output = model(batch.tokens_BS, token_info(batch, seed))
            chosen = output.logits_BSV.log_softmax(-1)[batch.targets_BS != IGNORE]
            targets = batch.targets_BS[batch.targets_BS != IGNORE]
            entropy = -chosen[torch.arange(len(targets)), targets].sum() / count
            (entropy + sum(output.losses.values()) / 2).backward()
            entropies.append(entropy.item())
            for name, loss in output.losses.items():
                router_losses[name] += loss.item() / 2
            for layer, seen in output.stats.items():
                stats[layer] = stats[layer] + seen if layer in stats else seen
        before = gradients_of(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        after = gradients_of(model)
        optimizer.step()
        results.append(
            {
                "numbers": {"loss": sum(entropies), "norm": float(norm), **router_losses},
                "load": {n: s.load_E.tolist() for n, s in stats.items()},
                "dropped": {n: int(s.dropped_E.sum()) for n, s in stats.items()},
                "entropy": {n: float(s.entropy / s.tokens) for n, s in stats.items()},
                "tokens": sum(int((~b.padding_BS).sum()) for b in batches),
                "gradients": before,
                "clipped": after,
                "weights": weights(model),
            }
        )
    return results


def distributed_run(
    config: RunConfig,
    ranks: Ranks,
    steps: int,
    mutation: Callable[[Ranks], AbstractContextManager[Any]],
) -> list[Result]:
    """The first of the same steps as the trainer takes them; this rank's part."""
    with mutation(ranks):
        model = prepared_model(config, ranks)
        sampler, train = sampler_of(config), config.train
        optimizer = build_optimizer(model, config.optimizer)
        seen: dict[str, dict[str, Tensor]] = {}

        norm_of = step.global_norm

        def watched_norm(*args: Any) -> Tensor:
            seen["gradients"] = gradients_of(model)
            return norm_of(*args)

        def before_update(*_: Any) -> None:
            seen["clipped"] = gradients_of(model)

        optimizer.register_step_pre_hook(before_update)
        results = []
        for number in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, train.steps, config.optimizer)
            batches = [
                sampler.batch(number, micro, train.accumulation, ranks.rank, ranks.world)
                for micro in range(train.accumulation)
            ]
            settings = StepSettings("fp64", config.optimizer.clip, train.seed)
            with patch.object(step, "global_norm", watched_norm):
                report = train_step(model, optimizer, batches, number + 1, ranks, settings)
            results.append(
                {
                    "numbers": {
                        "loss": report.loss,
                        "norm": report.grad_norm,
                        **report.router_losses,
                    },
                    "load": report.load,
                    "dropped": report.dropped,
                    "entropy": report.entropy,
                    "tokens": report.tokens,
                    **seen,
                    "weights": weights(model),
                }
            )
    return results


def shards(model_part: dict[str, Tensor], truth: dict[str, Tensor], rank: int, ep: int) -> Any:
    """Pairs (ours, truth) of this rank's tensors, experts cut to its shard."""
    assert model_part.keys() == truth.keys()
    for name, ours in model_part.items():
        expected = truth[name]
        if ours.shape != expected.shape:
            expected = expected.chunk(ep)[rank % ep]
        yield name, ours, expected


def errors_here(results: list[Result], truth: list[Result], rank: int, ep: int) -> dict[str, float]:
    """The largest relative error over the steps, by quantity, on this rank."""
    worst: dict[str, float] = {}

    def note(quantity: str, error: float) -> None:
        worst[quantity] = max(worst.get(quantity, 0.0), error)

    for ours, expected in zip(results, truth, strict=False):
        assert ours["numbers"].keys() == expected["numbers"].keys()
        for name, value in ours["numbers"].items():
            right = expected["numbers"][name]
            note(name, abs(value - right) / abs(right))
        for layer, value in ours["entropy"].items():
            note("entropy", abs(value - expected["entropy"][layer]))
        for name in ("load", "dropped", "tokens"):
            note(name, float(ours[name] != expected[name]))
        for kind in ("gradients", "clipped", "weights"):
            for name, mine, right in shards(ours[kind], expected[kind], rank, ep):
                expert = ".experts." in name
                label = f"{kind} of {'experts' if expert else 'the rest'}"
                note(label, relative_error(mine, right))
    return worst


def worst_of(by_rank: list[dict[str, float]]) -> dict[str, float]:
    assert all(errors.keys() == by_rank[0].keys() for errors in by_rank)
    return {name: max(errors[name] for errors in by_rank) for name in by_rank[0]}


def too_large(errors: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in errors.items() if error > TOLERANCE}


# --- ways to be wrong, each applied on the ranks while they train -------------------------------


def view(ranks: Ranks, **changes: Any) -> Any:
    """``ranks`` as a faulty reduction sees them."""
    seen = {
        "device": ranks.device,
        "data_group": ranks.data_group,
        "expert_group": ranks.expert_group,
        "replica_group": ranks.replica_group,
    }
    return SimpleNamespace(**{**seen, **changes})


def sum_with(**changes: Any) -> Callable[[Ranks], AbstractContextManager[Any]]:
    def mutation(ranks: Ranks) -> AbstractContextManager[Any]:
        wrong = {k: v(ranks) if callable(v) else v for k, v in changes.items()}

        def wrong_sum(model: Decoder, _: Ranks) -> None:
            gradients.sum_gradients(model, view(ranks, **wrong))

        return patch.object(step, "sum_gradients", wrong_sum)

    return mutation


def norm_with(**changes: Any) -> Callable[[Ranks], AbstractContextManager[Any]]:
    def mutation(ranks: Ranks) -> AbstractContextManager[Any]:
        wrong = {k: v(ranks) if callable(v) else v for k, v in changes.items()}

        def wrong_norm(model: Decoder, _: Ranks) -> Tensor:
            return gradients.global_norm(model, view(ranks, **wrong))

        return patch.object(step, "global_norm", wrong_norm)

    return mutation


def average(ranks: Ranks) -> AbstractContextManager[Any]:
    def wrong_sum(model: Decoder, _: Ranks) -> None:
        gradients.sum_gradients(model, ranks)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= ranks.world

    return patch.object(step, "sum_gradients", wrong_sum)


def average_experts(ranks: Ranks) -> AbstractContextManager[Any]:
    def wrong_sum(model: Decoder, _: Ranks) -> None:
        gradients.sum_gradients(model, ranks)
        for parameter in gradients.expert_parameters(model):
            assert parameter.grad is not None
            parameter.grad /= ranks.layout.ep

    return patch.object(step, "sum_gradients", wrong_sum)


@contextmanager
def clip_each_rank(ranks: Ranks) -> Iterator[None]:
    def wrong_sum(model: Decoder, _: Ranks) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        gradients.sum_gradients(model, ranks)

    with patch.object(step, "sum_gradients", wrong_sum):
        yield


def no_clip(ranks: Ranks) -> AbstractContextManager[Any]:
    return patch.object(step, "clip", lambda *_: None)


def clip_without_experts(ranks: Ranks) -> AbstractContextManager[Any]:
    def wrong_clip(model: Decoder, norm: Tensor, limit: float) -> None:
        for parameter in gradients.dense_parameters(model):
            assert parameter.grad is not None
            parameter.grad *= limit / float(norm)

    return patch.object(step, "clip", wrong_clip)


def mean_of_means(ranks: Ranks) -> AbstractContextManager[Any]:
    """Each rank divides by its own targets; padding makes those differ."""
    right = step.sum_over

    def wrong(tensor: Tensor, group: Any) -> Tensor:
        return tensor * ranks.world if tensor.dim() == 0 else right(tensor, group)

    return patch.object(step, "sum_over", wrong)


def own_balance(ranks: Ranks) -> AbstractContextManager[Any]:
    """Balance over this rank's tokens alone, its share of the mean."""
    right = TopKRouter.forward

    def wrong(self: TopKRouter, *args: Any) -> Any:
        self.group = None
        routing = right(self, *args)
        losses = {name: loss / ranks.world for name, loss in routing.losses.items()}
        return routing._replace(losses=losses)

    return patch.object(TopKRouter, "forward", wrong)


def noise_by_rank(ranks: Ranks) -> AbstractContextManager[Any]:
    return patch.object(step, "token_info", lambda b, seed: token_info(b, seed + ranks.rank))


def experts_swapped(ranks: Ranks) -> AbstractContextManager[Any]:
    """Each rank holds the other's experts."""
    right = Experts.__init__

    def wrong(self: Experts, width: int, config: Any, rank: int = 0, ranks: int = 1) -> None:
        right(self, width, config, ranks - 1 - rank, ranks)

    return patch.object(Experts, "__init__", wrong)


def world(_: Ranks) -> Any:
    return dist.group.WORLD


def own_ep(ranks: Ranks) -> Any:
    return ranks.expert_group


MUTATIONS: dict[str, tuple[Callable[[Ranks], AbstractContextManager[Any]], str]] = {
    "dense gradients are not summed": (sum_with(data_group=None), "gradients of the rest"),
    "dense gradients are summed over replicas alone": (
        sum_with(data_group=lambda ranks: ranks.replica_group),
        "gradients of the rest",
    ),
    "experts are not summed over replicas": (sum_with(replica_group=None), "gradients of experts"),
    "experts are summed over their own group": (
        sum_with(replica_group=own_ep),
        "gradients of experts",
    ),
    "experts are summed over all ranks": (sum_with(replica_group=world), "gradients of experts"),
    "the mean, not the sum": (average, "gradients of the rest"),
    "experts are averaged": (average_experts, "gradients of experts"),
    "the norm lacks other ranks' experts": (norm_with(expert_group=None), "norm"),
    "the norm counts replicas": (norm_with(expert_group=world), "norm"),
    "each rank clips its own": (clip_each_rank, "gradients of the rest"),
    "no clipping": (no_clip, "clipped of experts"),
    "experts are not clipped": (clip_without_experts, "clipped of experts"),
    "each rank divides by its own targets": (mean_of_means, "loss"),
    "each rank balances its own tokens": (own_balance, "balance"),
    "noise depends on the rank": (noise_by_rank, "loss"),
    "two ranks hold each other's experts": (experts_swapped, "loss"),
}


def on_rank(
    rank: int, world: int, jobs: list[tuple[str, int, bool]], data: Path, truth: Path
) -> list[dict[str, float]]:
    """Run each job (mutation or '', ep, recompute) in this process; its errors."""
    expected = torch.load(truth)
    errors = []
    for name, ep, recompute in jobs:
        mutation = MUTATIONS[name][0] if name else lambda _: nullcontext()
        steps = 1 if name else len(expected)
        bucket = 300 if recompute else gradients.BUCKET  # many buckets, or one
        with patch.object(gradients, "BUCKET", bucket):
            results = distributed_run(config_of(data, recompute), join(world, ep), steps, mutation)
        assert len(results) == steps
        errors.append(errors_here(results, expected, rank, ep))
    return errors


@pytest.fixture(scope="module")
def truth(data: Path) -> list[Result]:
    return plain_run(config_of(data))


LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
MUTATED = (4, 2)


@pytest.fixture(scope="module")
def outcomes(
    data: Path, truth: list[Result], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str, int, bool], dict[str, float]]:
    """The worst errors of every run, by (world, mutation, ep, recompute); each world starts once.

    Tensors stay on the ranks: a pipe would need a file descriptor for each.
    """
    file = tmp_path_factory.mktemp("truth") / "truth.pt"
    torch.save(truth, file)
    done: dict[tuple[int, str, int, bool], dict[str, float]] = {}
    for size in (1, 2, 4):
        jobs = [("", ep, again) for w, ep in LAYOUTS if w == size for again in (False, True)]
        if size == MUTATED[0]:
            jobs += [(name, MUTATED[1], False) for name in MUTATIONS]
        if size == 1:
            by_rank = [on_rank(0, 1, jobs, data, file)]
        else:
            by_rank = run_ranks(size, on_rank, size, jobs, data, file, timeout=120)
        for job, errors in zip(jobs, zip(*by_rank, strict=True), strict=True):
            done[(size, *job)] = worst_of(list(errors))
    return done


def test_the_case_is_hard_enough(truth: list[Result], data: Path) -> None:
    """Clipping bites, rows are dropped, an expert is empty, padding differs between ranks."""
    for result in truth:
        assert result["numbers"]["norm"] > 2 * CLIP
        assert result["load"].keys() == {1, 2}
        assert all(load[EMPTY] == 0 and max(load) > 0 for load in result["load"].values())
        assert all(dropped > 0 for dropped in result["dropped"].values())
    batches = [sampler_of(config_of(data)).batch(0, 0, 2, rank, 4) for rank in range(4)]
    assert len({int(batch.padding_BS.sum()) for batch in batches}) > 1
    assert all(batch.padding_BS.any() for batch in batches[:1])


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_a_layout_equals_one_plain_process(
    world: int, ep: int, recompute: bool, outcomes: dict[Any, Any]
) -> None:
    errors = outcomes[(world, "", ep, recompute)]
    assert len(errors) == 14
    assert too_large(errors) == {}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_noticed(name: str, outcomes: dict[Any, Any]) -> None:
    errors = outcomes[(MUTATED[0], name, MUTATED[1], False)]
    assert errors[MUTATIONS[name][1]] > 1e4 * TOLERANCE
