"""Sharded data parallelism (FSDP2, HSDP; ZeRO, arXiv 1910.02054), experts over ranks of their own.

Each parameter is split along one dimension over the ``shard`` ranks; before use it is gathered,
after the backward pass its gradient is reduce-scattered: summed, since losses are shares.
"""

from collections.abc import Iterable
from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from coterie.models.decoder import Block, Decoder
from coterie.moe.experts import Experts
from coterie.parallel.distributed import Ranks
from coterie.parallel.placement import shard_dim


def release(stage: nn.Module) -> None:
    """Give back what a forward pass without a backward pass has left gathered."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard(stage: nn.Module, decoder: Decoder, ranks: Ranks) -> None:
    """Shard the parameters of ``decoder``, in place; ``stage`` is the module around it that is
    called. Groups of parameters that are gathered together: each block without its experts, these,
    the embedding, the output layer."""
    layout = ranks.layout
    if layout.shard == 1:
        return
    mesh = ranks.sharding_mesh("dense")
    expert_mesh = ranks.sharding_mesh("expert") if layout.expert_shard > 1 else None
    # a stage of a pipeline runs many micro-batches: gathering for each would cost more than memory
    reshard = layout.pp == 1
    experts = [module for module in decoder.modules() if isinstance(module, Experts)]
    ignored = set() if expert_mesh else {p for e in experts for p in e.parameters()}

    def wrap(modules: nn.Module | list[nn.Module], mesh: DeviceMesh, reshard: bool) -> None:
        shards = mesh.size(mesh.ndim - 1)
        fully_shard(
            modules,
            mesh=mesh,
            reshard_after_forward=reshard,
            shard_placement_fn=lambda p: Shard(shard_dim(tuple(p.shape), shards)),
            ignored_params=ignored,
        )

    if expert_mesh is not None:
        for module in experts:
            wrap(module, expert_mesh, reshard)
            register_fsdp_forward_method(module, "over")
    for block in cast(Iterable[Block], decoder.blocks.values()):
        wrap(block, mesh, reshard)
    tied = decoder.embedding and decoder.head and decoder.embedding.weight is decoder.head.weight
    if decoder.embedding is not None and not tied:
        wrap(decoder.embedding, mesh, reshard)
    if decoder.head is not None and decoder.norm is not None and not tied:
        wrap([decoder.norm, decoder.head], mesh, False)
    wrap(stage, mesh, False)
    for wrapped in stage.modules():
        if isinstance(wrapped, FSDPModule):
            wrapped.set_gradient_divide_factor(1.0)
            wrapped.set_force_sum_reduction_for_comms(True)
