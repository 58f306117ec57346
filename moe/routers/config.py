"""The choice of a router: one config for each kind."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from coterie.moe.routers.expert_choice import ExpertChoiceConfig
from coterie.moe.routers.hash import HashConfig
from coterie.moe.routers.mlp import MLPConfig
from coterie.moe.routers.modality import ModalityConfig
from coterie.moe.routers.random_fixed import RandomFixedConfig
from coterie.moe.routers.sinkhorn import SinkhornConfig
from coterie.moe.routers.top_k import TopKConfig


def _kind(given: Any) -> Any:
    """The ``kind`` of a config or a group of settings; without one it is a top-k router's."""
    if isinstance(given, dict):
        return given.get("kind", "top_k")
    return getattr(given, "kind", None)


RouterConfig = Annotated[
    Annotated[TopKConfig, Tag("top_k")]
    | Annotated[MLPConfig, Tag("mlp")]
    | Annotated[RandomFixedConfig, Tag("random_fixed")]
    | Annotated[ExpertChoiceConfig, Tag("expert_choice")]
    | Annotated[ModalityConfig, Tag("modality")]
    | Annotated[HashConfig, Tag("hash")]
    | Annotated[SinkhornConfig, Tag("sinkhorn")],
    Discriminator(_kind),
]
"""How tokens and experts find each other; ``kind`` says which router."""
