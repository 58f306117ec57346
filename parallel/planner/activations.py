"""Bytes that each part of the model holds for one micro-batch: exact for what autograd keeps.

Here is what the parts have in common, and those outside the halves of a block, which
``attention_activations`` and ``feed_forward_activations`` have.

``kept`` is what stays from the forward to the backward pass, each storage counted once; weights
are not in it, their half-precision copies under autocast are. A test compares it with what autograd
saves (``torch.autograd.graph.saved_tensors_hooks``). ``forward`` and ``backward`` are the most that
is live on top inside a pass, read off the code.
"""

from dataclasses import dataclass

from coterie.parallel.planner.workload import INT, Workload


@dataclass(frozen=True)
class Held:
    """Bytes for one micro-batch."""

    kept: int = 0
    """From the end of the forward pass to the end of the backward pass, the input included."""
    forward: int = 0
    """The most at once inside the forward pass, what is kept included."""
    backward: int = 0
    """The most at once inside the backward pass, beyond what is kept and the gradients of
    parameters."""


def norm(work: Workload) -> int:
    """What RMSNorm keeps over the residual stream: on CUDA x and 1/rms, elsewhere x/rms too."""
    whole = work.own * work.model.width * work.whole
    return norm_copies(work) * whole + work.own * work.whole


def norm_copies(work: Workload) -> int:
    """How many tensors of its input's size RMSNorm keeps: untied, x/rms on CUDA too, and each
    token's gain."""
    if work.model.untie.norm:
        return 3
    return 1 if work.device == "cuda" else 2


def cast_weights(work: Workload, count: int) -> int:
    """Half-precision copies of ``count`` weights, kept with the activations."""
    return count * work.half if work.autocast else 0


def embedding(work: Workload) -> Held:
    """The lookup, and with tp its sum over ranks; the result is kept by the first block."""
    stream = work.own * work.model.width * work.whole
    parts = work.gathered * work.model.width * work.whole if work.layout.tp > 1 else 0
    return Held(0, stream + 2 * parts, stream + parts)


def modalities(work: Workload) -> int:
    """Which token has which modality, and where it goes: made once, used by every layer."""
    if not work.model.untie.any:
        return 0
    joined = work.gathered if work.layout.tp > 1 else 0
    return (work.own + joined + 3 * work.gathered + 1) * INT


def choosing(work: Workload, layer: int) -> Held:
    """Scores of all tokens, and those that pass brought to block ``layer``."""
    depths, inside = work.model.depths_of(layer), work.inside(layer)
    assert depths is not None
    split = work.layout.tp * work.layout.cp > 1
    stream = work.own * work.model.width * work.whole
    places = work.rows * inside.sequence
    taken = inside.own * work.model.width * work.whole
    # what is scored, and its gates; the column of each place, and whose it is
    kept = stream + work.own * work.whole + places * (INT + split)
    # cosines and sines of the places' positions
    kept += 2 * inside.gathered * work.head_width * work.half
    if depths.foresees:
        kept += predictor(work, 1)
    whole = places * work.model.width * work.whole
    return Held(kept, kept + taken + (2 * whole if split else 0), stream + taken + split * whole)


def predictor(work: Workload, choosers: int) -> int:
    """What an auxiliary router keeps besides its input: both hidden values; for each chooser its
    answer, the right one, and whether that counts."""
    hidden = -(-work.model.width // 2)
    return work.own * (2 * (hidden + choosers) * work.whole + choosers) + INT


def foreseeing(work: Workload, choosers: int, among: int = 0) -> Held:
    """An auxiliary router where it alone is trained; ``among``: of the experts of a layer, whose
    tokens are brought together."""
    width, whole = work.model.width, work.whole
    kept = work.own * width * whole + predictor(work, choosers)
    kept += (work.own + among) * INT if among else 0
    backward = work.own * (2 * -(-width // 2) + choosers) * whole
    return Held(kept, kept, backward)


def adding(work: Workload, layer: int) -> Held:
    """x + g · f(x) of the tokens that pass block ``layer``."""
    places = work.rows * work.inside(layer).sequence
    whole = places * work.model.width * work.whole
    kept = whole + places * (work.whole + 1)  # f(x), g, and the places that count
    stream = work.own * work.model.width * work.whole
    return Held(kept, kept + whole + stream, 2 * whole)


def logits(work: Workload) -> int:
    """Bytes of a micro-batch's logits, or of their gradient."""
    return work.gathered * work.vocabulary * max(4, work.half)


def head(work: Workload) -> Held:
    """The last norm, the output layer and the cross-entropy, which works in float32 at least."""
    width, half = work.model.width, work.half
    stream = work.own * width * work.whole
    joined = work.gathered * width
    exact = max(4, half)
    logits = work.gathered * work.vocabulary
    kept = norm(work) + joined * half + cast_weights(work, work.vocabulary * width)
    kept += logits * exact  # log-probabilities
    gathered = joined * work.whole if work.layout.tp > 1 and work.autocast else 0
    forward = kept + stream + gathered + logits * half + (logits * exact if work.autocast else 0)
    return Held(kept, forward, 2 * logits * exact)
