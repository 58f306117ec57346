"""Bytes that the attention half of a block holds for one micro-batch (see ``activations``)."""

from coterie.parallel.planner.activations import Held, cast_weights, norm, norm_copies
from coterie.parallel.planner.workload import INT, Workload


def attention_half(work: Workload) -> Held:
    """x + attention(norm(x))."""
    width, half, whole = work.model.width, work.half, work.whole
    stream = work.own * width * whole
    joined = work.gathered * width
    q, k = _heads(work)
    normed = norm(work)
    kept = normed + _attention_input(work) + cast_weights(work, _attention_weights(work))
    kept += _projected(work)
    if work.recompute != "selective":
        kept += _core(work) + _sorted_result(work)
    else:
        kept += q  # the output layer's input
    kept += gated_result(work)
    # rotating holds the product with cos, the two halves exchanged, and their product with sin
    rotating = max(2 * k + 3.5 * q, k + 2 * q + 3.5 * k - q)
    inputs = normed + stream + (joined * whole if work.layout.tp > 1 else 0)
    inputs += (3 + bool(work.gates)) * joined * half if work.autocast else 0
    weights = cast_weights(work, _attention_weights(work))
    out = (joined * half if work.layout.tp > 1 else 0) + stream
    forward = inputs + weights + int(max(q + rotating, 2 * q + 2 * k + q + out + _core(work)))
    if work.model.untie.qkvo:  # sorted by modality: the input, and the last product until restored
        forward += joined * half + max(q, joined * half)
    again = _core(work) if work.recompute == "selective" else 0
    backward = stream + joined * half + q + (q + 2 * k) + again + gated_result(work)
    return Held(kept, max(kept, forward + gated_result(work)), backward)


def _heads(work: Workload) -> tuple[int, int]:
    """Bytes of all queries, and of all keys, that this rank computes."""
    each = work.gathered * work.head_width * work.half // work.layout.tp
    return work.model.attention.heads * each, work.kv_heads * each


def _attention_weights(work: Workload) -> int:
    heads = 2 * work.model.attention.heads + 2 * work.kv_heads
    each = (heads * work.head_width + work.gates) * work.model.width // work.layout.tp
    return each * (work.model.untie.modalities if work.model.untie.qkvo else 1)


def _sorted_result(work: Workload) -> int:
    """The output layer's input sorted by modality, beside attention's result (unless gates have
    made another of that)."""
    return _heads(work)[0] if work.model.untie.qkvo and not work.gates else 0


def gated_result(work: Workload) -> int:
    """Attention's gates, and its result times them."""
    gates = work.gathered * work.gates // work.layout.tp * work.half
    return gates + _heads(work)[0] if gates else 0


def _attention_input(work: Workload) -> int:
    """x for the weights' gradients: cast once for each of q, k, v and gate under autocast."""
    each = work.gathered * work.model.width * work.half
    return (3 + bool(work.gates)) * each if work.autocast else each


def _projected(work: Workload) -> int:
    """Queries and keys after rotation, values, and what normalising them keeps."""
    attention, layout = work.model.attention, work.layout
    q, k = _heads(work)
    total = q + 2 * k
    if layout.cp > 1:  # of keys and values those of all ranks are kept, in order; not this one's
        total += 2 * k * layout.cp - 2 * k + work.sequence * INT
    if attention.qk_norm:
        untied = work.model.untie.norm
        elements = (q + k) // work.half
        kept = (norm_copies(work) - untied) * elements + elements // work.head_width
        # a token's gains are the same for all heads
        kept += 2 * work.gathered * work.head_width if untied else 0
        total += kept * work.whole
    return total


def _core(work: Workload) -> int:
    """The attention's result, its log-sum-exp, and its mask."""
    q, _ = _heads(work)
    cp = work.layout.cp
    rows = work.gathered * work.model.attention.heads // work.layout.tp
    total = q + rows * max(4, work.whole if work.compute == "fp64" else 4)
    if cp > 1:
        total += q  # both pieces, and them joined
    piece = work.sequence // (2 * cp)
    if work.model.attention.within_documents:
        cells = work.sequence**2 if cp == 1 else (2 * cp + 1) * piece**2
        total += work.rows * cells * work.half
    elif cp > 1:
        total += (2 * cp + 1) * piece**2 * work.half
    return total


def rotations(work: Workload) -> int:
    """Cosines and sines of the positions: made once, used by every layer."""
    return 2 * work.sequence // work.layout.cp * work.head_width * work.half
