"""What a router may know of each token besides its activation."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TokenInfo:
    """Facts about the T tokens of a micro-batch, each optional; passed explicitly all the way down.

    (A side channel would be wrong under pipelining and recompute.)
    """

    token_T: Tensor | None = None
    """int64 id of each token in the vocabulary."""
    modality_T: Tensor | None = None
    """int64 modality id of each token."""
    modalities: int = 1
    """How many modality ids there are, for counting: known here, not read off the tensor, which a
    device would have to be waited for. 1: rows are not counted by modality."""
    padding_T: Tensor | None = None
    """bool: True for padding, which is neither routed nor counted."""
    sequence_T: Tensor | None = None
    """int64 in 0..B-1, non-decreasing: the sequence of each token; capacity is counted in each."""
    position_T: Tensor | None = None
    """int64: place of each token in its sequence; needed where ranks hold parts of a sequence."""
    document_T: Tensor | None = None
    """int64: the document of each token inside its sequence; attention may be kept inside it."""
    router_state_TR: Tensor | None = None
    """What the router of the mixture-of-experts layer before has computed, with its gradient."""
    key_T: Tensor | None = None
    """int64 random key of each token, from (seed, step, sample, position): the same in every
    layout and in a recompute. Absent: routing is without noise (evaluation)."""
    k: int | None = None
    """Experts for each token; None: as many as the router is configured for."""
    by_choice: bool = False
    """In evaluation too, routers with auxiliary routers choose among all tokens, later ones too."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenInfo":
        """The same with ``change`` applied to each tensor."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {
            name: change(value) for name, value in values if isinstance(value, Tensor)
        }
        return replace(self, **changed)
