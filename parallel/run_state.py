"""Everything a checkpoint holds, by name: weights and optimizer moments as parts of the whole."""

from coterie.parallel.model import ParallelModel
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.part import Part


def model_parts(model: ParallelModel) -> dict[str, Part]:
    """``model.<name>``, sharing memory with the parameters: loading into them fills the model."""
    return {f"model.{name}": model.part(name, parameter) for name, parameter in model.named()}


def optimizer_parts(model: ParallelModel, optimizer: Optimizer) -> dict[str, Part]:
    """``optimizer.<parameter>.<moment>``, made (zero) where the optimizer has none yet."""
    parts: dict[str, Part] = {}
    for name in optimizer.parameters:
        place = model.places[name]
        for moment, tensor in optimizer.moments(name).items():
            part = model.part(name, tensor)
            if moment == "step":  # each part has a count, all are equal
                part = Part.whole(tensor, place.owner and not any(place.box.offset))
            parts[f"optimizer.{name}.{moment}"] = part
    return parts
