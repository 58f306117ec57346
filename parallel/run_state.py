"""Everything a checkpoint holds, by name: weights and optimizer moments as global tensors."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from coterie.parallel.distributed import Ranks
from coterie.parallel.gradients import expert_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


def model_tensors(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """``model.<name>``; expert weights are DTensors of all experts, so that any layout can load.

    They share memory with the parameters: loading into them fills the model.
    """
    experts = {id(p) for p in expert_parameters(model)}
    return {
        f"model.{name}": _global(parameter.detach(), id(parameter) in experts, ranks)
        for name, parameter in model.named_parameters()
    }


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Tensor]:
    """``optimizer.<parameter>.<moment>``, made (zero) where the optimizer has none yet."""
    experts = {id(p) for p in expert_parameters(model)}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            device = parameter.device
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter)
        tensors[f"optimizer.{name}.step"] = state["step"]
        for moment in MOMENTS:
            tensor = _global(state[moment], id(parameter) in experts, ranks)
            tensors[f"optimizer.{name}.{moment}"] = tensor
    return tensors


def _global(tensor: Tensor, is_expert: bool, ranks: Ranks) -> Tensor:
    if not is_expert or ranks.mesh is None:
        return tensor
    return DTensor.from_local(tensor, ranks.mesh, [Replicate(), Shard(0)], run_check=False)
