"""Parameters that no gradient moves: some routers change theirs after each step."""

import torch

from coterie.parallel.model import ParallelModel


@torch.no_grad()
def update_frozen(model: ParallelModel, load: dict[int, list[int]]) -> None:
    """Add what routers ask for to this rank's part of their frozen parameters.

    ``load``: rows for each expert in the step, by layer, over all ranks, so that all ranks that
    hold a parameter change it alike.
    """
    for decoder in model.decoders:
        for layers, router in decoder.routers():
            changes = router.updates(torch.tensor([load[layer] for layer in layers]).sum(0))
            for name, change in changes.items():
                full_name = f"blocks.{layers[0]}.moe.router.{name}"
                part = model.part(full_name, router.get_parameter(name))
                part.tensor.add_(change[part.box.slices].to(part.tensor))
