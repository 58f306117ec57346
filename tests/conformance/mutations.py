"""Errors to plant in the runtime, each with the smallest layout that shows it and the check that
must fail. The product has no switch for any of them: each is patched in while a test runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from coterie.comm.axis import Axis
from coterie.comm.sequence import all_context_positions, gather, reduce_scatter
from coterie.data import Batch
from coterie.launch import assemble
from coterie.models import attention, vocabulary
from coterie.models.decoder import Decoder
from coterie.moe import feed_forward
from coterie.moe.experts import Experts
from coterie.moe.routers import top_k
from coterie.moe.routers.top_k import TopKRouter
from coterie.parallel import evaluate, gradients, micro_batch, optimizer, pipeline, step
from coterie.parallel.distributed import Ranks
from coterie.parallel.layout import Layout
from coterie.parallel.model import ParallelModel, local
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.placement import Place
from coterie.parallel.tally import Tally, Totals
from tests.conformance.case import STEPS
from tests.conformance.layouts import job_of
from tests.conformance.worker import Job

Planted = AbstractContextManager[Any]
Plant = Callable[[Ranks], Planted]
"""Given this rank's place, a context in which the error is there."""


@dataclass(frozen=True)
class Mutation:
    """An error to plant."""

    job: Job
    """The layout that shows it."""
    check: str
    """The quantity that it makes wrong."""
    plant: Plant


# --- sums of gradients --------------------------------------------------------------------------


def summed(change: Callable[[Place, Layout, str | None], str | None]) -> Plant:
    """Gradients are summed over another axis than the right one, which ``change`` is told."""
    right = gradients.summed_over

    def wrong(place: Place, layout: Layout) -> str | None:
        return change(place, layout, right(place, layout))

    return lambda _: patch.object(gradients, "summed_over", wrong)


def is_partial(place: Place) -> bool:
    """Whether each rank of tp has a gradient of its own tokens alone."""
    return not place.expert and not place.tensor_parallel


def dense_not_summed(place: Place, layout: Layout, axis: str | None) -> str | None:
    return axis if place.expert else None


def dense_over_replicas(place: Place, layout: Layout, axis: str | None) -> str | None:
    return "replicate" if is_partial(place) else axis


def partial_not_summed(place: Place, layout: Layout, axis: str | None) -> str | None:
    return None if is_partial(place) else axis


def split_over_data(place: Place, layout: Layout, axis: str | None) -> str | None:
    even = place.box.whole[0] % layout.tp == 0  # the vocabulary's parts have not even the same size
    return "data" if place.tensor_parallel and even else axis


def experts_not_summed(place: Place, layout: Layout, axis: str | None) -> str | None:
    return None if place.expert else axis


def experts_over_experts(place: Place, layout: Layout, axis: str | None) -> str | None:
    return "expert" if place.expert else axis


def experts_over_data(place: Place, layout: Layout, axis: str | None) -> str | None:
    return "data" if place.expert else axis


def averaged(chosen: Callable[[Place], bool]) -> Plant:
    """The mean over ranks, where it should be the sum."""

    def plant(ranks: Ranks) -> Planted:
        def wrong(model: ParallelModel) -> None:
            gradients.sum_gradients(model)
            for name, parameter in model.named():
                if chosen(model.places[name]) and parameter.grad is not None:
                    parameter.grad /= ranks.layout.dp

        return patch.object(step, "sum_gradients", wrong)

    return plant


def factor_left(_: Ranks) -> Planted:
    return patch.object(FSDPModule, "set_gradient_divide_factor", lambda *_: None)


def mesh_without_replicas(_: Ranks) -> Planted:
    def wrong(self: Ranks, kind: str) -> DeviceMesh:
        group = self.groups["shard" if kind == "dense" else "expert_shard"]
        return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("shard",))

    return patch.object(Ranks, "sharding_mesh", wrong)


def scaled_by_schedule(_: Ranks) -> Planted:
    right = pipeline.Schedule1F1B

    def wrong(*args: Any, **settings: Any) -> Any:
        return right(*args, **{**settings, "scale_grads": True})

    return patch.object(pipeline, "Schedule1F1B", wrong)


# --- norm and clipping --------------------------------------------------------------------------


def norm_with(
    group: Callable[[Ranks], ProcessGroup | None] = lambda ranks: dist.group.WORLD,
    owner: Callable[[Place, Ranks], bool] = lambda place, _: place.owner,
) -> Plant:
    """The norm of what ``owner`` says, summed over ``group``."""

    def plant(ranks: Ranks) -> Planted:
        right = step.global_norm

        def wrong(model: ParallelModel) -> Tensor:
            places = {n: replace(p, owner=owner(p, ranks)) for n, p in model.places.items()}
            with (
                patch.object(model, "places", places),
                patch.object(Ranks, "everyone", property(group)),
            ):
                return right(model)

        return patch.object(step, "global_norm", wrong)

    return plant


def own_stage(ranks: Ranks) -> ProcessGroup | None:
    return ranks.groups.get("data")


def own_shard(ranks: Ranks) -> ProcessGroup | None:
    return ranks.groups.get("replicate")


def own_experts(place: Place, ranks: Ranks) -> bool:
    """As rank 0 of ep would count if it knew no experts but its own."""
    return place.owner and (not place.expert or ranks.place.ep == 0)


def clip_by_own_norm(_: Ranks) -> Planted:
    def wrong(model: ParallelModel, norm: Tensor, limit: float) -> None:
        square = sum(local(p.grad).square().sum() for _, p in model.named() if p.grad is not None)
        gradients.clip(model, torch.as_tensor(square).sqrt(), limit)

    return patch.object(step, "clip", wrong)


def no_clip(_: Ranks) -> Planted:
    return patch.object(step, "clip", lambda *_: None)


def clip_without_experts(_: Ranks) -> Planted:
    def wrong(model: ParallelModel, norm: Tensor, limit: float) -> None:
        for name, parameter in model.named():
            if not model.places[name].expert and parameter.grad is not None:
                parameter.grad *= limit / float(norm)

    return patch.object(step, "clip", wrong)


# --- losses, targets, statistics ----------------------------------------------------------------


def own_targets(ranks: Ranks) -> Planted:
    """The mean over ranks of each one's mean; padding makes their targets differ."""
    right = step.count_targets

    def wrong(batches: list[Batch], ranks: Ranks) -> Tensor:
        return right(batches, replace(ranks, groups={})) * ranks.layout.dp

    return patch.object(step, "count_targets", wrong)


def targets_of_every_tp_rank(_: Ranks) -> Planted:
    right = step.count_targets

    def wrong(batches: list[Batch], ranks: Ranks) -> Tensor:
        return right(batches, ranks) * ranks.layout.tp

    return patch.object(step, "count_targets", wrong)


def tokens_of_every_tp_rank(_: Ranks) -> Planted:
    right = step._TrainingJob.__init__

    def wrong(self: Any, *args: Any) -> None:
        right(self, *args)
        self.axes = replace(self.axes, sequence=Axis("sequence"))

    return patch.object(step._TrainingJob, "__init__", wrong)


def counts_with(change: Callable[..., tuple[Tensor, Tensor]]) -> Plant:
    """Other statistics for the router's losses: from its own load and tokens, the right ones, and
    the number of ranks."""

    def plant(ranks: Ranks) -> Planted:
        right = top_k.global_counts

        def wrong(load_E: Tensor, tokens: Tensor, group: Any) -> tuple[Tensor, Tensor]:
            totals = right(load_E, tokens, group)
            return change(load_E, tokens, *totals, ranks.layout.stage_ranks)

        return patch.object(top_k, "global_counts", wrong)

    return plant


def own_load(load_E: Tensor, _: Tensor, __: Tensor, total: Tensor, ranks: int) -> Any:
    return load_E * ranks, total


def own_tokens(load_E: Tensor, tokens: Tensor, total_E: Tensor, _: Tensor, ranks: int) -> Any:
    return total_E, tokens * ranks


def balance_again(_: Ranks) -> Planted:
    """A side channel that every pass writes to, the recomputing one too."""
    tallies: list[Tally] = []
    right_init, right_forward = Tally.__init__, TopKRouter.forward

    def init(self: Tally, *args: Any) -> None:
        right_init(self, *args)
        tallies[:] = [self]

    def forward(self: TopKRouter, *args: Any) -> Any:
        routing = right_forward(self, *args)
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward:
            tallies[0].count("router.balance", routing.losses["balance"])
        return routing

    return both(patch.object(Tally, "__init__", init), patch.object(TopKRouter, "forward", forward))


def router_loss_lost(_: Ranks) -> Planted:
    return patch.object(step, "with_loss", lambda x, _: x)


def divided_again(_: Ranks) -> Planted:
    right = TopKRouter._with_losses

    def wrong(self: TopKRouter, *args: Any) -> Any:
        routing = right(self, *args)
        losses = {name: loss / 2 for name, loss in routing.losses.items()}
        return routing._replace(losses=losses)

    return patch.object(TopKRouter, "_with_losses", wrong)


def own_layers(change: Callable[[Totals, Totals], Totals]) -> Plant:
    """Of the routers' statistics, some that this rank alone saw."""

    def plant(_: Ranks) -> Planted:
        right = Tally.over_ranks

        def wrong(self: Tally) -> Totals:
            alone = copy(self)
            ranks = self._ranks
            alone._ranks = SimpleNamespace(  # type: ignore[assignment]
                everyone=None, layout=ranks.layout, place=ranks.place
            )
            return change(right(self), right(alone))

        return patch.object(Tally, "over_ranks", wrong)

    return plant


def load_of_own_stage(everyone: Totals, own: Totals) -> Totals:
    return replace(everyone, layers=own.layers)


def entropy_of_own_tokens(everyone: Totals, own: Totals) -> Totals:
    layers = {
        n: replace(seen, entropy=own.layers[n].entropy) for n, seen in everyone.layers.items()
    }
    return replace(everyone, layers=layers)


def own_held_out(_: Ranks) -> Planted:
    return patch.object(evaluate, "sum_over", lambda sums, _: sums)


def noise_by_rank(ranks: Ranks) -> Planted:
    def wrong(batch: Batch, axes: Any, seed: int, k: int | None) -> Any:
        return micro_batch.token_info(batch, axes, seed + ranks.rank, k)

    return patch.object(step, "token_info", wrong)


# --- who holds what -----------------------------------------------------------------------------


def experts_swapped(_: Ranks) -> Planted:
    right = Experts.__init__

    def wrong(self: Experts, width: int, config: Any, ep: Axis, *rest: Any) -> None:
        right(self, width, config, replace(ep, rank=ep.size - 1 - ep.rank), *rest)

    return patch.object(Experts, "__init__", wrong)


def slices_swapped(_: Ranks) -> Planted:
    """Of w_out the slice of another rank than of w_in."""
    right = Experts.__init__

    def wrong(self: Experts, width: int, config: Any, ep: Axis, etp: Axis, *rest: Any) -> None:
        right(self, width, config, ep, etp, *rest)
        experts, hidden = self.cuts["w_out_EFD"]
        other = replace(etp, rank=etp.size - 1 - etp.rank)
        self.cuts["w_out_EFD"] = (experts, replace(hidden, axis=other))

    return patch.object(Experts, "__init__", wrong)


def blocks_swapped(_: Ranks) -> Planted:
    right = assemble.blocks_of_stages
    return patch.object(assemble, "blocks_of_stages", lambda *args: right(*args)[::-1])


def shards_copied(_: Ranks) -> Planted:
    return patch.object(optimizer, "local", lambda tensor: local(tensor).clone())


def flat_shards(_: Ranks) -> Planted:
    """Matrices that became vectors by sharding have no weight decay."""
    right = Optimizer.__init__

    def wrong(self: Optimizer, model: ParallelModel, config: Any) -> None:
        right(self, model, config.model_copy(update={"weight_decay": 0.0}))

    return patch.object(Optimizer, "__init__", wrong)


# --- the sequence over ranks --------------------------------------------------------------------


class _SlicedGather(torch.autograd.Function):
    """Gathers; of the gradient it takes this rank's slice, and does not add that of the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return gather(x, dim, axis).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank].contiguous(), None, None


class _OwnReduceScatter(torch.autograd.Function):
    """Reduce-scatters; the gradient of other ranks' parts is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return reduce_scatter(x, dim, axis).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        parts = [torch.zeros_like(dy) for _ in range(ctx.axis.size)]
        parts[ctx.axis.rank] = dy
        return torch.cat(parts, ctx.dim), None, None


def sliced_gather(module: Any, name: str) -> Plant:
    """``module`` takes a slice where it should reduce-scatter, over the axis called ``name``."""

    def wrong(x: Tensor, dim: int, axis: Axis) -> Tensor:
        if axis.name != name or not x.requires_grad:
            return gather(x, dim, axis)
        return _SlicedGather.apply(x, dim, axis)

    return lambda _: patch.object(module, "gather", wrong)


def embedding_of_own_positions(_: Ranks) -> Planted:
    return patch.object(vocabulary, "reduce_scatter", _OwnReduceScatter.apply)


def loss_without(operation: Any) -> Plant:
    """The loss over the split vocabulary lacks one of its reductions."""

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        if op != operation:
            dist.all_reduce(tensor, op=op, group=group)

    fake = SimpleNamespace(all_reduce=all_reduce, ReduceOp=dist.ReduceOp)
    return lambda _: patch.object(vocabulary, "dist", fake)


def contiguous_rotation(_: Ranks) -> Planted:
    def wrong(length: int, cp: Axis, device: Any = None) -> Tensor:
        return torch.arange(length, device=device).chunk(cp.size)[cp.rank]

    return both(
        patch.object(attention, "context_positions", wrong),
        patch.object(attention, "_rotation", attention._rotation.__wrapped__),  # nothing cached
    )


def documents_as_held(_: Ranks) -> Planted:
    """The mask has the documents in the order of the ranks, not of the positions."""
    right = Decoder._documents

    def wrong(self: Decoder, info: Any, rows: int) -> Tensor | None:
        document_BS = right(self, info, rows)
        assert document_BS is not None
        order = all_context_positions(document_BS.shape[1], self.axes.cp)
        return document_BS[:, order]

    return patch.object(Decoder, "_documents", wrong)


def facts_of_other_rank(_: Ranks) -> Planted:
    right = micro_batch.sequence_part

    def wrong(x_BS: Tensor, cp: Axis, tp: Axis) -> Tensor:
        return right(x_BS, cp, replace(tp, rank=tp.size - 1 - tp.rank))

    return patch.object(micro_batch, "sequence_part", wrong)


def capacity_of_part(_: Ranks) -> Planted:
    right = top_k.within_shared_capacity

    def wrong(
        expert_TK: Tensor, score_TK: Tensor, info: Any, _: Axis, *rest: Any, **by: Any
    ) -> Any:
        return right(expert_TK, score_TK, info, Axis("sequence"), *rest, **by)

    return patch.object(top_k, "within_shared_capacity", wrong)


@contextmanager
def both(*contexts: Planted) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


DENSE, EXPERTS = "gradients of the rest", "gradients of experts"


def entry(
    check: str, plant: Plant, processes: int, recompute: str = "none", **axes: Any
) -> Mutation:
    """One step shows it, unless it is in what only the end of the run shows."""
    steps = STEPS if check == "held out" else 1
    return Mutation(replace(job_of(processes, recompute, **axes), steps=steps), check, plant)


MUTATIONS: dict[str, Mutation] = {
    # sums of gradients
    "dense gradients are not summed": entry(DENSE, summed(dense_not_summed), 2),
    "dense gradients are averaged": entry(DENSE, averaged(lambda p: not p.expert), 2),
    "parameters that tp does not split are summed over replicas alone": entry(
        DENSE, summed(dense_over_replicas), 4, tp=2
    ),
    "parameters that tp does not split are not summed": entry(
        DENSE, summed(partial_not_summed), 2, tp=2
    ),
    "sharded parameters that tp does not split are not summed over tp": entry(
        DENSE, summed(partial_not_summed), 4, tp=2, dp_shard=2
    ),
    "parameters that tp splits are summed over tp": entry(DENSE, summed(split_over_data), 2, tp=2),
    "experts are not summed over replicas": entry(EXPERTS, summed(experts_not_summed), 2),
    "experts are averaged": entry(EXPERTS, averaged(lambda p: p.expert), 2),
    "experts are summed with other experts": entry(EXPERTS, summed(experts_over_experts), 2, ep=2),
    "experts are summed over all ranks": entry(EXPERTS, summed(experts_over_data), 4, ep=2),
    "slices of experts are summed with other slices": entry(
        EXPERTS, summed(experts_over_data), 2, etp=2
    ),
    "FSDP's divide factor is left at its default": entry(DENSE, factor_left, 2, dp_shard=2),
    "FSDP's divide factor of experts is left at its default": entry(
        EXPERTS, factor_left, 2, dp_shard=2
    ),
    "HSDP sums over shards alone": entry(DENSE, mesh_without_replicas, 4, dp_shard=2),
    "the schedule divides gradients by the micro-batches": entry(
        DENSE, scaled_by_schedule, 2, pp=2, schedule="1f1b"
    ),
    # norm and clipping
    "the norm lacks other stages": entry("norm", norm_with(own_stage), 2, pp=2),
    "the norm counts replicas": entry("norm", norm_with(owner=lambda *_: True), 2),
    "the norm counts what tp does not split once for each of its ranks": entry(
        "norm", norm_with(owner=lambda p, _: p.owner or is_partial(p)), 2, tp=2
    ),
    "the norm misses other shards": entry("norm", norm_with(own_shard), 2, dp_shard=2),
    "the norm lacks other ranks' experts": entry("norm", norm_with(owner=own_experts), 2, ep=2),
    "each rank clips by the norm of its own gradients": entry(
        "clipped of experts", clip_by_own_norm, 2, ep=2
    ),
    "gradients are not clipped": entry("clipped of the rest", no_clip, 1),
    "experts are not clipped": entry("clipped of experts", clip_without_experts, 1),
    # losses, targets, statistics
    "each rank divides by its own targets": entry("loss", own_targets, 2),
    "targets are counted on every rank of tp": entry("loss", targets_of_every_tp_rank, 2, tp=2),
    "tokens are counted on every rank of tp": entry("tokens", tokens_of_every_tp_rank, 2, tp=2),
    "each rank balances its own tokens": entry("balance", counts_with(own_load), 2),
    "the z loss is a mean of the ranks' means": entry("z", counts_with(own_tokens), 2),
    "the balance loss is counted again by recompute": entry("balance", balance_again, 1, "full"),
    "a stage's router losses are lost on the way": entry(DENSE, router_loss_lost, 2, pp=2),
    "router losses are divided by the micro-batches again": entry("balance", divided_again, 1),
    "load statistics of other stages are lost": entry(
        "load", own_layers(load_of_own_stage), 2, pp=2
    ),
    "entropy is of the rank's own tokens": entry("entropy", own_layers(entropy_of_own_tokens), 2),
    "held-out loss is of the rank's own rows": entry("held out", own_held_out, 2),
    "noise depends on the rank": entry("loss", noise_by_rank, 2),
    # who holds what
    "two ranks hold each other's experts": entry("loss", experts_swapped, 2, ep=2),
    "two ranks swap slices of an expert": entry("loss", slices_swapped, 2, etp=2),
    "two stages swap their blocks": entry("loss", blocks_swapped, 2, pp=2),
    "the optimizer steps a copy of a shard": entry(
        "weights of the rest", shards_copied, 2, dp_shard=2
    ),
    "sharded matrices escape weight decay": entry("weights of experts", flat_shards, 2, dp_shard=2),
    # the sequence over ranks
    "the output layer's gradient is sliced, not summed": entry(
        DENSE, sliced_gather(vocabulary, "tp"), 2, tp=2
    ),
    "a feed-forward layer's gradient is sliced, not summed": entry(
        DENSE, sliced_gather(feed_forward, "tp"), 2, tp=2
    ),
    "keys and values get no gradient from other ranks' queries": entry(
        DENSE, sliced_gather(attention, "cp"), 2, cp=2
    ),
    "the embedding's gradient for other ranks' positions is lost": entry(
        DENSE, embedding_of_own_positions, 2, tp=2
    ),
    "the split loss lacks the sum over ranks": entry(
        "loss", loss_without(dist.ReduceOp.SUM), 2, tp=2
    ),
    "the split loss lacks the largest logit over ranks": entry(
        "loss", loss_without(dist.ReduceOp.MAX), 2, tp=2
    ),
    "rotary positions are contiguous, the sequence is mirrored": entry(
        "loss", contiguous_rotation, 2, cp=2
    ),
    "documents are masked in the order of ranks": entry("loss", documents_as_held, 2, cp=2),
    "facts of tokens are another rank's": entry("loss", facts_of_other_rank, 2, tp=2),
    "capacity is counted in parts of a sequence": entry("dropped", capacity_of_part, 2, cp=2),
}


def hang_on_one(ranks: Ranks) -> Planted:
    def wait_for_ever(model: ParallelModel) -> None:
        if ranks.rank == 1:
            threading.Event().wait()
        gradients.sum_gradients(model)

    return patch.object(step, "sum_gradients", wait_for_ever)


def raise_on_one(ranks: Ranks) -> Planted:
    def refuse(model: ParallelModel) -> None:
        if ranks.rank == 1:
            raise ValueError("the sentence of rank 1")
        gradients.sum_gradients(model)

    return patch.object(step, "sum_gradients", refuse)


FAULTS: dict[str, Plant] = {"rank 1 hangs": hang_on_one, "rank 1 raises": raise_on_one}
"""What ends a run, to test those who watch it."""


def plant_of(name: str) -> Plant:
    """The planted error called ``name``."""
    return FAULTS[name] if name in FAULTS else MUTATIONS[name].plant
