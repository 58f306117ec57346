"""Where the weights of a mixture of experts come from, when it goes on from a trained model.

Sparse upcycling (arXiv 2212.05055): each expert is a copy of the trained feed-forward, or a slice
of it as in SMoE-Dropout (arXiv 2303.01610). A model of several modalities with one feed-forward for
each (MoMa's 1t1i, arXiv 2407.21770, or untied ones) gives each modality's experts its own.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from coterie.comm.axis import Axes
from coterie.core.box import Box
from coterie.core.config import Config
from coterie.core.errors import UserError
from coterie.models.config import DecoderConfig
from coterie.models.decoder import Decoder
from coterie.moe.routers.modality import ModalityConfig, modality_of_experts

How = Literal["copy", "slice"]
Shapes = dict[str, tuple[int, ...]]


class Member(NamedTuple):
    """A box of a trained tensor: the whole of a new one, or its entry at one index."""

    tensor: str
    box: Box

    def within(self, piece: Box) -> Box:
        """Where ``piece`` of the new tensor's entry lies in the trained one, which may have the
        index of an entry before."""
        lead = len(self.box.whole) - len(piece.shape)
        offset = tuple(a + b for a, b in zip(self.box.offset[lead:], piece.offset, strict=True))
        return Box(
            self.box.whole, self.box.offset[:lead] + offset, self.box.shape[:lead] + piece.shape
        )


@dataclass(frozen=True)
class Origin:
    """What a new tensor is made of: nothing (it is drawn), one member, or one for each entry of its
    first dimension."""

    members: tuple[Member, ...] = ()
    stacked: bool = False
    factor: float = 1.0


def origins(old: DecoderConfig, new: DecoderConfig, how: How) -> dict[str, Origin]:
    """By name, the origin of each parameter of ``new``, of a model that was trained as ``old``.

    Raises:
        UserError: the models differ in more than their experts; names both values.
    """
    _check_alike(old, new)
    trained, wanted = _shapes(old), _shapes(new)
    found: dict[str, Origin] = {}
    for layer in range(new.layers):
        if new.first_like(layer) < layer or not new.is_moe(layer):
            continue
        if _same(old, new, layer):
            _check_router(old, new, layer)
        else:
            found |= _experts(old, new, layer, how, trained)
    for name, shape in wanted.items():
        if name not in found:
            found[name] = _origin(name, shape, trained)
    used = {member.tensor for origin in found.values() for member in origin.members}
    for name in trained:
        if name not in used and ".router." not in name:
            raise UserError(
                f"the trained model has {name}, which the new one has no place for: upcycling only "
                "adds experts"
            )
    return found


_ALIKE = (
    "vocabulary",
    "width",
    "layers",
    "shared_depth",
    "mixture_of_depths",
    "norm_eps",
    "tie_embeddings",
    "attention",
)


def _check_alike(old: DecoderConfig, new: DecoderConfig) -> None:
    """What has to be the same in both."""
    pairs = [pair for key in _ALIKE for pair in _pairs(key, getattr(old, key), getattr(new, key))]
    dense = any(not new.is_moe(layer) for layer in range(new.layers))
    for key in ("qkvo", "norm", *(["ffn"] if dense else [])):  # shared weights may be untied now
        if getattr(old.untie, key):
            pairs.append((f"untie.{key}", True, getattr(new.untie, key)))
    if old.untie.any and new.untie.any:
        pairs.append(("untie.modalities", old.untie.modalities, new.untie.modalities))
    for key, before, now in pairs:
        if before != now:
            raise UserError(
                f"model.{key} is {_word(now)}, but was {_word(before)} in the trained run: "
                "upcycling only adds experts"
            )


def _pairs(key: str, before: object, now: object) -> Iterator[tuple[str, object, object]]:
    """(key, before, now) of a setting; where both are groups, of each setting in them."""
    if isinstance(before, Config) and isinstance(now, Config):
        for name in type(now).model_fields:
            yield from _pairs(f"{key}.{name}", getattr(before, name), getattr(now, name))
    else:
        yield key, before, now


def _word(value: object) -> str:
    """As a config's YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, Config):
        return "{" + ", ".join(f"{name}: {_word(part)}" for name, part in value) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shapes(config: DecoderConfig) -> Shapes:
    with torch.device("meta"):
        model = Decoder(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _same(old: DecoderConfig, new: DecoderConfig, layer: int) -> bool:
    """Whether ``layer`` is the same mixture in both, and goes on with its router."""
    if not old.is_moe(layer):
        return False
    before, now = old.moe_of(layer), new.moe_of(layer)
    kinds = [router.kind for router in (before.router, now.router)]
    same = before.experts == now.experts and kinds[0] == kinds[1]
    return same and _groups(old, layer) == _groups(new, layer)


def _check_router(old: DecoderConfig, new: DecoderConfig, layer: int) -> None:
    """Of a router that goes on: what makes combine weights of its logits, which the trained experts
    go with."""
    before, now = old.moe_of(layer).router, new.moe_of(layer).router
    for key in ("score", "renormalise", "scale"):
        values = [_word(getattr(router, key, None)) for router in (before, now)]
        if values[0] != values[1]:
            raise UserError(
                f"model.moe.router.{key} is {values[1]}, but was {values[0]} in the trained run, "
                f"whose router of layer {layer} goes on: set model.moe.router.{key}={values[0]}"
            )


def _groups(config: DecoderConfig, layer: int) -> tuple[int, ...]:
    """The modality of each expert; 0 where they have none."""
    moe = config.moe_of(layer)
    if isinstance(moe.router, ModalityConfig):
        return modality_of_experts(moe.router.experts)
    return (0,) * moe.experts.count


def _origin(name: str, shape: tuple[int, ...], trained: Shapes) -> Origin:
    """Of what is not in an upcycled mixture: the tensor of its name, for each modality if it was
    not untied before."""
    for before in (name, re.sub(r"norm\.\d+\.weight$", "norm.weight", name)):
        if trained.get(before) == shape:
            return Origin((Member(before, Box.all_of(shape)),))
    before = name.replace("MPFD", "PFD").replace("MFD", "FD")
    if trained.get(before) == shape[1:]:
        return Origin((Member(before, Box.all_of(shape[1:])),) * shape[0], stacked=True)
    if name in trained:
        raise UserError(
            f"{name} has shape {list(shape)}, but had {list(trained[name])} in the trained run"
        )
    raise UserError(
        f"the new model has {name} of shape {list(shape)}, but the trained one has nothing to make "
        "it of"
    )


def _experts(
    old: DecoderConfig, new: DecoderConfig, layer: int, how: How, trained: Shapes
) -> dict[str, Origin]:
    """Of a mixture's experts, and its router, which is drawn."""
    count, groups = new.experts_of(layer), _groups(new, layer)
    sources = list(_feed_forwards(old, layer))
    if len(sources) > 1 and len(sources) != len(set(groups)):
        raise UserError(
            f"layer {layer} has feed-forwards of {len(sources)} modalities in the trained run, but "
            f"the new experts are of {len(set(groups))}: set model.moe.router.kind to modality, "
            f"with {len(sources)} numbers in model.moe.router.experts"
        )
    parts = _parts(old, new, layer, how)
    hidden = new.moe_of(layer).experts.hidden
    found = {f"{_block(layer)}.moe.router.{name}": Origin() for name in _router(new, layer)}
    factors = (1.0, _factor(old, new, layer, parts))
    for at, (target, factor) in enumerate(zip(_WEIGHTS, factors, strict=True)):
        members = []
        for expert in range(count):
            source = sources[groups[expert] if len(sources) > 1 else 0]
            box = Box.all_of(trained[source.names[at]])
            if source.entry is not None:
                box = box.cut(0, range(source.entry, source.entry + 1))
            if parts > 1:  # the hidden width is the last dimension but one of both
                box = box.cut(len(box.shape) - 2, range(expert * hidden, (expert + 1) * hidden))
            members.append(Member(source.names[at], box))
        name = f"{_block(layer)}.moe.experts.{target}"
        found[name] = Origin(tuple(members), stacked=True, factor=factor)
    return found


_WEIGHTS = ("w_in_EPFD", "w_out_EFD")


def _block(layer: int) -> str:
    return f"blocks.{layer}"


def _router(config: DecoderConfig, layer: int) -> list[str]:
    moe = config.moe_of(layer)
    with torch.device("meta"):
        router = moe.router.build(config.width, moe.experts.count, Axes())
    return [name for name, _ in router.named_parameters()]


class _FeedForward(NamedTuple):
    """A trained feed-forward: the tensors of its two products, and where it is in these."""

    names: tuple[str, str]
    entry: int | None


def _feed_forwards(config: DecoderConfig, layer: int) -> Iterator[_FeedForward]:
    """Those of a trained layer: one, or one for each modality."""
    if not config.is_moe(layer):
        untied = config.untie.ffn
        names = ("w_in_MPFD", "w_out_MFD") if untied else ("w_in_PFD", "w_out_FD")
        first, second = (f"{_block(layer)}.feed_forward.{name}" for name in names)
        for index in range(config.untie.modalities) if untied else [None]:
            yield _FeedForward((first, second), index)
        return
    groups = _groups(config, layer)
    if len(set(groups)) != len(groups):
        raise UserError(
            f"layer {layer} has {len(groups)} experts in the trained run, but upcycling needs a "
            "dense layer, or one expert for each modality"
        )
    first, second = (f"{_block(layer)}.moe.experts.{name}" for name in _WEIGHTS)
    for modality in sorted(groups):
        yield _FeedForward((first, second), groups.index(modality))


def _parts(old: DecoderConfig, new: DecoderConfig, layer: int, how: How) -> int:
    """In how many slices each feed-forward is cut; 1: none."""
    before = old.moe_of(layer).experts if old.is_moe(layer) else old.feed_forward
    now = new.moe_of(layer).experts
    assert before is not None
    if before.activation != now.activation:
        raise UserError(
            f"model.moe.experts.activation is {now.activation}, but the trained feed-forward of "
            f"layer {layer} has {before.activation}"
        )
    if how == "copy":
        if before.hidden != now.hidden:
            raise UserError(
                f"model.moe.experts.hidden is {now.hidden}, but the trained feed-forward of layer "
                f"{layer} has {before.hidden}, and its copies have as much"
            )
        return 1
    router = new.moe_of(layer).router
    if router.weight_sum is None:
        raise UserError(
            "slices need a router whose weights of a token have a constant sum (top_k with "
            "renormalise, mlp with renormalise and without skip, random_fixed, hash), but "
            f"model.moe.router.kind is {router.kind}"
        )
    if now.count * now.hidden != before.hidden:
        raise UserError(
            f"model.moe.experts.hidden is {now.hidden}, so {now.count} experts have "
            f"{now.count * now.hidden} together, but the trained feed-forward of layer {layer} has "
            f"{before.hidden}, and its slices have as much"
        )
    return now.count


def _factor(old: DecoderConfig, new: DecoderConfig, layer: int, parts: int) -> float:
    """On the output weights: what makes the weighted sum over all slices, or over any copies, the
    trained layer's result, where combine weights have a constant sum."""
    now = new.moe_of(layer).router.weight_sum
    before = old.moe_of(layer).router.weight_sum if old.is_moe(layer) else None
    return parts * (before or 1.0) / (now or 1.0)
