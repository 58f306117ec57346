"""What each rank of a run holds, told without starting it."""

import torch

from coterie.core.box import Box
from coterie.launch.config import RunConfig
from coterie.models import Decoder
from coterie.models.decoder import DecoderPart
from coterie.parallel.distributed import Ranks
from coterie.parallel.layout import Layout
from coterie.parallel.model import places_of
from coterie.parallel.rules import blocks_of_stages
from coterie.parallel.run_state import MOMENTS


def boxes_of_rank(config: RunConfig, layout: Layout, rank: int) -> dict[str, Box]:
    """By name, the boxes that ``rank`` saves: those of its weights and of their moments."""
    layers = config.model.layers
    blocks = blocks_of_stages(config.parallel, layers) if layout.pp > 1 else (range(layers),)
    ranks = Ranks(rank, torch.device("meta"), layout)
    boxes: dict[str, Box] = {}
    for number in layout.stages_of(ranks.place.pp):
        part = DecoderPart(blocks[number], embedding=number == 0, head=number == len(blocks) - 1)
        with torch.device("meta"):
            decoder = Decoder(config.model, ranks.axes, part)
        decoder.tie()
        for name, place in places_of(decoder, ranks).items():
            boxes[f"model.{name}"] = place.box
            if place.box.numel:  # the optimizer leaves out what is empty
                boxes[f"optimizer.{name}.step"] = Box.all_of(())
                boxes |= {f"optimizer.{name}.{moment}": place.box for moment in MOMENTS}
    return boxes
