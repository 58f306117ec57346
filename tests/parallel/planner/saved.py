"""What autograd saves of a part of the model, counted by its own hooks."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from coterie.comm.axis import Axes
from coterie.models import Decoder, DecoderConfig, initialise
from coterie.models.untied import Modalities, normed
from coterie.moe.tokens import TokenInfo
from coterie.parallel.distributed import Ranks, make_groups
from coterie.parallel.layout import Layout

PARTS = ("attention", "dense", "moe")
WIDTH, SEQUENCE, ROWS = 64, 64, 2


def model_config(**settings: Any) -> DecoderConfig:
    """A dense layer, then one of experts; ``settings`` override."""
    tree: dict[str, Any] = {
        "vocabulary": 277,
        "width": WIDTH,
        "layers": 2,
        "attention": {"heads": 4, "kv_heads": 2},
        "feed_forward": {"hidden": 96},
        "dense_layers": [0],
        "moe": {"experts": {"count": 8, "hidden": 48}, "router": {"k": 2}},
    }
    return DecoderConfig.model_validate(tree | settings)


def saved_bytes(run: Callable[[], Any], model: nn.Module, once: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps after ``run``, weights left out, and what
    is made ``once`` for all blocks."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *once)}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = run()  # while its result lives, no address is used twice
    del kept
    return sum(storages.values())


def saved_by_part(config: DecoderConfig, compute: str, axes: Axes = Axes()) -> dict[str, int]:
    """Bytes that each half of a block saves, on this rank."""
    torch.manual_seed(0)
    dtype = torch.float64 if compute == "fp64" else torch.float32
    model = Decoder(config, axes).to(dtype)
    initialise(model, 0, residual_branches=4)
    own = SEQUENCE // (axes.tp.size * axes.cp.size)
    x_BSD = torch.randn(ROWS, own, config.width, dtype=dtype, requires_grad=True)
    tokens = torch.arange(ROWS * own)
    info = TokenInfo(
        token_T=tokens,
        modality_T=tokens % 2,
        key_T=tokens,
        sequence_T=tokens // own,
        document_T=torch.zeros_like(tokens),
    )
    documents_BS = torch.zeros(ROWS, SEQUENCE, dtype=torch.int64)
    first, second = model.blocks["0"], model.blocks["1"]
    known = Modalities.of(info, x_BSD.shape[:2], config.untie.modalities, axes.tp)
    once = (known.own_BS, known.gathered_BS, known.order_G, *known.inverse)

    def attention() -> Any:
        x = x_BSD + 1  # a leaf would be cast once where activations are cast for each use
        normed_BSD = normed(first.attention_norm, x, known.own_BS)
        return x + first.attention(normed_BSD, documents_BS, known)

    def dense() -> Any:
        x = x_BSD + 1
        normed_BSD = normed(first.feed_forward_norm, x, known.own_BS)
        return x + first.feed_forward(normed_BSD, *([known] if config.untie.ffn else []))

    def moe() -> Any:
        x = x_BSD + 1
        before = x if second.route_before_attention else None
        output = second.moe(normed(second.feed_forward_norm, x, known.own_BS), info, before)
        return x + output.y, output

    found = {}
    for name, run in (("attention", attention), ("dense", dense), ("moe", moe)):
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
            found[name] = saved_bytes(run, model, once)
    return found


def saved_on_rank(
    rank: int, world: int, cases: list[tuple[dict[str, Any], DecoderConfig, str]]
) -> list[dict[str, int]]:
    """Of each (layout's sizes, config, precision), what this rank saves."""
    found = []
    for sizes, config, compute in cases:
        layout = Layout(**sizes)
        ranks: Ranks = make_groups(layout, torch.device("cpu"), timedelta(seconds=60))
        found.append(saved_by_part(config, compute, ranks.axes))
    return found
