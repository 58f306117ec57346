"""What each rank of a run saves, told without starting it."""

from coterie.core.box import Box
from coterie.launch.config import RunConfig
from coterie.parallel.layout import Layout
from coterie.parallel.optimizer import ADAMW_MOMENTS, moments_of
from coterie.parallel.placement import places
from coterie.parallel.rules import blocks_of_stages


def boxes_of_rank(config: RunConfig, layout: Layout, rank: int) -> dict[str, Box]:
    """By name, the boxes of the weights of ``rank`` and of their moments."""
    blocks = blocks_of_stages(config.parallel, config.model.layers)
    boxes: dict[str, Box] = {}
    for name, place in places(config.model, blocks, layout, rank).items():
        boxes[f"model.{name}"] = place.box
        if place.box.numel and not place.frozen:  # the optimizer leaves out what is empty
            moments = moments_of(config.optimizer, name, place.box.whole)
            if moments == ADAMW_MOMENTS:
                boxes[f"optimizer.{name}.step"] = Box.all_of(())
            boxes |= {f"optimizer.{name}.{moment}": place.box for moment in moments}
    return boxes
