"""MoMa (arXiv 2407.21770): experts of one modality each, which choose among its tokens.

All modalities are routed at once: they differ in which tokens an expert may take. So one without
tokens keeps its parameters in the graph, and every rank takes part in every exchange.
"""

from fractions import Fraction
from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from coterie.comm.axis import Axes
from coterie.moe.routers.base import Router
from coterie.moe.routers.expert_choice import ExpertChoiceRouter, ExpertChoiceSettings
from coterie.moe.tokens import TokenInfo


class ModalityConfig(ExpertChoiceSettings):
    """Each modality has experts and router weights of its own; they choose among its tokens
    (MoMa)."""

    kind: Literal["modality"] = "modality"
    """Which router."""
    experts: tuple[PositiveInt, ...] = Field(default=(4, 4), min_length=1)
    """Experts of each modality, by its id (text 0, image 1)."""
    score: Literal["softmax", "sigmoid"] = "sigmoid"
    """Scores from logits: softmax over a token's experts, or an independent sigmoid for each."""
    noise: bool = True
    """In training, add Gumbel noise to the logits (Gumbel-sigmoid; needs `score: sigmoid`)."""

    @property
    def causal(self) -> bool:
        """Also where experts take all tokens of their modality (one expert for each)."""
        return self.auxiliary or all(count <= self.capacity_factor for count in self.experts)

    def check(self, num_experts: int) -> None:
        if sum(self.experts) != num_experts:
            raise ValueError(
                f"router.experts {list(self.experts)} add up to {sum(self.experts)}, "
                f"but experts.count is {num_experts}"
            )
        if self.capacity_factor > min(self.experts):
            raise ValueError(
                f"capacity_factor {self.capacity_factor:g} exceeds the {min(self.experts)} experts "
                "that a token of some modality can have"
            )

    def build(self, width: int, num_experts: int, axes: Axes) -> Router:
        self.check(num_experts)
        return ModalityRouter(width, modality_of_experts(self.experts), self, axes)


class ModalityRouter(ExpertChoiceRouter):
    """Expert choice inside each modality; ``groups``: the modality of each expert."""

    def group_of(self, x_TD: Tensor, info: TokenInfo) -> Tensor:
        if info.modality_T is None:
            raise ValueError("a router with modalities needs the modality_T of its tokens")
        known = max(self.groups) + 1
        unknown_T = (info.modality_T < 0) | (info.modality_T >= known)
        if info.padding_T is not None:
            unknown_T = unknown_T & ~info.padding_T
        if bool(unknown_T.any()):
            first = int(info.modality_T[unknown_T][0])
            raise ValueError(f"a token has modality {first}, but there are experts of {known} only")
        return info.modality_T


def modality_of_experts(experts: tuple[int, ...]) -> tuple[int, ...]:
    """The modality of each expert id, for so many ``experts`` of each modality.

    They take turns, evenly spread: whatever number of expert-parallel ranks share consecutive ids,
    each has its part of every modality (exactly, where the ranks divide the modality's experts), so
    that no rank waits for the text of a batch of images.
    """
    places = [
        (Fraction(2 * number + 1, 2 * count), modality)
        for modality, count in enumerate(experts)
        for number in range(count)
    ]
    return tuple(modality for _, modality in sorted(places))
