"""Everything a checkpoint holds, by name: weights and optimizer moments as parts of the whole."""

import torch

from coterie.parallel.model import ParallelModel
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.part import Part

MOMENTS = ("exp_avg", "exp_avg_sq")


def model_parts(model: ParallelModel) -> dict[str, Part]:
    """``model.<name>``, sharing memory with the parameters: loading into them fills the model."""
    return {f"model.{name}": model.part(name, parameter) for name, parameter in model.named()}


def optimizer_parts(model: ParallelModel, optimizer: Optimizer) -> dict[str, Part]:
    """``optimizer.<parameter>.<moment>``, made (zero) where the optimizer has none yet."""
    parts: dict[str, Part] = {}
    for name, parameter in optimizer.parameters.items():
        state = optimizer.adamw.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter)
        place = model.places[name]
        first = place.owner and not any(place.box.offset)  # each part has a count, all are equal
        parts[f"optimizer.{name}.step"] = Part.whole(state["step"], first)
        for moment in MOMENTS:
            parts[f"optimizer.{name}.{moment}"] = model.part(name, state[moment])
    return parts
