"""What a checkpoint of a :class:`~coterie.parallel.mixer.MixerTrainer` holds, whatever the layout.

An expert is a row of its stacked parameters, and an environment a row of the contexts: each rank
gives the rows that it has. The gate is the same on all ranks. Random numbers have no state: they
are keyed by the step.
"""

from typing import Any

import torch
from torch import Tensor, nn

from coterie.core.box import Box
from coterie.parallel.mixer import MixerTrainer
from coterie.parallel.part import Part


def mixer_parts(trainer: MixerTrainer) -> dict[str, Part]:
    """Tensors by name, sharing memory with the trainer: loading into them, then
    :func:`restore_progress`, makes it go on where the saved one was."""
    environments, experts = trainer.environments, trainer.model.experts
    home_E = environments.home_E
    first = int((home_E < trainer.grid.world.rank).sum())
    at_home = range(first, first + len(environments.context_H))
    here = range(experts.first, experts.first + experts.local)

    parts = {"environments.expert": Part.whole(environments.expert_E)}
    parts |= {
        f"router.{name}": Part.whole(buffer)
        for name, buffer in trainer.model.router.named_buffers()
    }
    rows = {"environments.context": (environments.context_H, len(home_E), at_home)}
    for name, parameter in experts.named_parameters():
        rows[f"experts.{name}"] = (parameter, trainer.model.config.experts, here)
    for name, parameter in trainer.model.router.named_parameters():
        rows[f"router.{name}"] = (parameter, len(parameter), range(len(parameter)))
    for name, (parameter, length, held) in rows.items():
        box = Box.all_of((length, *parameter.shape[1:])).cut(0, held)
        parts[name] = Part(parameter.detach(), box)
        for moment, tensor in _moments(trainer, parameter).items():
            scalar = moment == "step"  # a count for each part, all are equal
            part = Part.whole(tensor) if scalar else Part(tensor, box)
            parts[f"optimizer.{name}.{moment}"] = part
    return parts


def progress(trainer: MixerTrainer) -> dict[str, Any]:
    """The rest: counts, as plain JSON."""
    return {"round": trainer.round, "step": trainer.step}


def restore_progress(trainer: MixerTrainer, state: dict[str, Any]) -> None:
    """After the tensors of :func:`mixer_parts` were loaded; every rank calls."""
    trainer.round, trainer.step = int(state["round"]), int(state["step"])
    trainer.environments.share_contexts()
    trainer.environments.migrate()


def _moments(trainer: MixerTrainer, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's, made (zero) where it has taken no step yet."""
    assert isinstance(parameter, nn.Parameter)
    state = trainer.optimizer_of(parameter).state[parameter]
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return dict(state)
