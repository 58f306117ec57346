"""Bytes that each part of the model holds for one micro-batch: exact for what autograd keeps.

``kept`` is what stays from the forward to the backward pass, each storage counted once; weights
are not in it, their half-precision copies under autocast are. A test compares it with what autograd
saves (``torch.autograd.graph.saved_tensors_hooks``). ``forward`` and ``backward`` are the most that
is live on top inside a pass, read off the code.
"""

from dataclasses import dataclass

from coterie.moe.activations import ACTIVATIONS
from coterie.moe.feed_forward import FeedForwardConfig
from coterie.moe.routers.expert_choice import ExpertChoiceConfig
from coterie.moe.routers.hash import HashConfig
from coterie.moe.routers.mlp import MLPConfig
from coterie.moe.routers.modality import ModalityConfig
from coterie.moe.routers.random_fixed import RandomFixedConfig
from coterie.moe.routers.sinkhorn import SinkhornConfig
from coterie.moe.routers.top_k import TopKConfig
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


def embedding(work: Workload) -> Held:
    """The lookup, and with tp its sum over ranks; the result is kept by the first block."""
    stream = work.own * work.model.width * work.whole
    parts = work.gathered * work.model.width * work.whole if work.layout.tp > 1 else 0
    return Held(0, stream + 2 * parts, stream + parts)


def norm(work: Workload) -> int:
    """What RMSNorm keeps over the residual stream: on CUDA x and 1/rms, elsewhere x/rms too."""
    whole = work.own * work.model.width * work.whole
    return _copies(work) * whole + work.own * work.whole


def _copies(work: Workload) -> int:
    """Of its input's size, what RMSNorm keeps: untied, x/rms on CUDA too, and each token's gain."""
    if work.model.untie.norm:
        return 3
    return 1 if work.device == "cuda" else 2


def attention_half(work: Workload) -> Held:
    """x + attention(norm(x))."""
    width, half, whole = work.model.width, work.half, work.whole
    stream = work.own * width * whole
    joined = work.gathered * width
    q, k = _heads(work)
    normed = norm(work)
    kept = normed + _attention_input(work) + _weights(work, _attention_weights(work))
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
    weights = _weights(work, _attention_weights(work))
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


def modalities(work: Workload) -> int:
    """Which token has which modality, and where it goes: made once, used by every layer."""
    if not work.model.untie.any:
        return 0
    joined = work.gathered if work.layout.tp > 1 else 0
    return (work.own + joined + 3 * work.gathered + 1) * INT


def gated_result(work: Workload) -> int:
    """Attention's gates, and its result times them."""
    gates = work.gathered * work.gates // work.layout.tp * work.half
    return gates + _heads(work)[0] if gates else 0


def _attention_input(work: Workload) -> int:
    """x for the weights' gradients: cast once for each of q, k, v and gate under autocast."""
    each = work.gathered * work.model.width * work.half
    return (3 + bool(work.gates)) * each if work.autocast else each


def _weights(work: Workload, count: int) -> int:
    """Half-precision copies of ``count`` weights, kept with the activations."""
    return count * work.half if work.autocast else 0


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
        kept = (_copies(work) - untied) * elements + elements // work.head_width
        # a token's gains are the same for all heads
        kept += 2 * work.gathered * work.head_width if untied else 0
        total += kept * work.whole
    return total


def rotations(work: Workload) -> int:
    """Cosines and sines of the positions: made once, used by every layer."""
    return 2 * work.sequence // work.layout.cp * work.head_width * work.half


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


def dense_half(work: Workload) -> Held:
    """x + feed_forward(norm(x)) of a dense layer."""
    config = work.model.feed_forward
    assert config is not None
    stream = work.own * work.model.width * work.whole
    untied = work.model.untie.ffn
    inner = untied_feed_forward(work, config) if untied else feed_forward(work, config)
    normed = norm(work)
    return Held(
        normed + inner.kept,
        normed + stream + inner.forward,
        stream + inner.backward,
    )


def feed_forward(work: Workload, config: FeedForwardConfig) -> Held:
    """A dense feed-forward layer alone; without autocast and tp its input is the norm's result."""
    parts = ACTIVATIONS[config.activation].parts
    joined = work.gathered * work.model.width
    hidden = work.gathered * config.hidden // work.layout.tp * work.half
    weights = (parts + 1) * config.hidden * work.model.width // work.layout.tp
    inputs = joined * work.half
    inner = (parts + 1) * hidden
    kept = inputs + _weights(work, weights)
    if work.recompute != "selective":
        kept += inner
    gathered = joined * work.whole if work.layout.tp > 1 and work.autocast else 0
    out = joined * work.half * (2 if work.layout.tp > 1 else 1)
    forward = inputs + gathered + _weights(work, weights) + inner + out
    backward = out + (parts + 1) * hidden + (inner if work.recompute == "selective" else 0)
    return Held(kept, forward, backward)


def untied_feed_forward(work: Workload, config: FeedForwardConfig) -> Held:
    """A dense layer with weights for each modality: their rows sorted, computed as experts are."""
    parts = ACTIVATIONS[config.activation].parts
    number, width, half = work.model.untie.modalities, work.model.width, work.half
    hidden = config.hidden // work.layout.tp
    padded = work.gathered
    if work.device == "cpu" and work.compute == "fp32":
        padded += number * (PADDED - 1) // 2
    row = (parts + (work.device == "cuda" and work.autocast)) * hidden
    joined, inner = work.gathered * width, padded * row * half
    kept = joined * half + _weights(work, number * (parts + 1) * hidden * width)
    kept += inner if work.recompute != "selective" else 0
    gathered = joined * work.whole if work.layout.tp > 1 or work.autocast else 0
    forward = kept + gathered + 2 * joined * half
    backward = 2 * joined * half + (inner if work.recompute == "selective" else 0)
    return Held(kept, forward, backward)


def moe_half(work: Workload, count: int) -> Held:
    """x + moe(norm(x)) with ``count`` experts."""
    config = work.model.moe
    assert config is not None
    tokens, width = work.own, work.model.width
    stream = tokens * width * work.whole
    routing = router(work, count)
    rows = exchange(work)
    experts_ = experts(work, count)
    # a router that learns keeps its input, unless attention's half has kept it as it is
    learns = not isinstance(config.router, RandomFixedConfig | HashConfig)
    jitter = isinstance(config.router, TopKConfig) and config.router.jitter
    routed = learns and not (config.route_before_attention and not jitter)
    kept = norm(work) + routed * stream + routing + rows.kept + experts_.kept
    forward = norm(work) + stream + routing + rows.forward + experts_.forward
    backward = stream + max(rows.backward + experts_.backward, 0)
    if config.shared is not None:
        shared = feed_forward(work, config.shared)
        # the input is the router's; only casting or gathering makes another
        same = learns and not work.autocast and work.layout.tp == 1
        same = same and not config.route_before_attention
        own = shared.kept - (tokens * width * work.half if same else 0)
        kept += own
        forward = max(forward, kept - own + shared.forward + 2 * stream)
        if config.shared_gate:  # the output and its gate; cast: x and the gate's weights
            kept += tokens * (width + 1) * work.half
            kept += (tokens + 1) * width * work.half if work.autocast else 0
        if config.shared_mix:  # both outputs and their weights; cast: x and the weights' weights
            weight = work.whole if work.device == "cuda" else work.half
            kept += 2 * tokens * (width * work.half + weight)
            kept += (tokens + 2) * width * work.half if work.autocast else 0
        backward = max(backward, stream + shared.backward)
    return Held(kept, max(kept + 2 * stream, forward), backward)


def router(work: Workload, experts_: int) -> int:
    """What the router keeps besides its input."""
    assert work.model.moe is not None
    match work.model.moe.router:
        case TopKConfig() as config:
            return _top_k(work, config, experts_)
        case RandomFixedConfig() as config:
            # logits; choices, their probabilities, and the order of rows
            return _scores(work, experts_) + work.own * config.k * (2 * INT + work.whole)
        case HashConfig():
            return 0
        case SinkhornConfig() as config:  # scores, choices, and the order of rows
            return _scores(work, experts_) + work.own * config.k * 2 * INT
        case ExpertChoiceConfig() | ModalityConfig() as config:
            return _expert_choice(work, config.score, experts_)


def _scores(work: Workload, experts_: int) -> int:
    return work.own * experts_ * work.whole


def _expert_choice(work: Workload, score: str, experts_: int) -> int:
    """Scores, and the experts that chose; with softmax also their logarithms and what was shut."""
    kept = _scores(work, experts_) + work.sent // work.layout.etp * INT
    if score == "softmax":
        kept += _scores(work, experts_) + _scores(work, experts_) // work.whole
    return kept


def _top_k(work: Workload, config: TopKConfig, experts_: int) -> int:
    """Scores, logits, choices and their places."""
    tokens, whole = work.own, work.whole
    choices = tokens * config.k
    scores = _scores(work, experts_)
    kept = scores + choices * INT + choices * INT  # scores, experts chosen, order of rows
    if config.renormalise:
        kept += choices * whole + tokens * whole
    if config.z_loss:
        kept += scores + tokens * whole + INT
    if config.score == "sigmoid" and config.balance_loss:
        kept += tokens * whole
    if config.balance_loss:
        kept += experts_ * whole + INT
    if config.sequence_loss:  # the sequence of each token; of each sequence, loads and its length
        kept += tokens * INT + work.rows * (experts_ + 1) * whole + INT
    features = config.hidden if isinstance(config, MLPConfig) else 0
    if features:  # of the norm (as of norm()), its result, and both sides of each GELU
        kept += tokens * ((6 if work.device == "cuda" else 7) * features + 1) * whole
    if config.jitter:
        kept += tokens * (features or work.model.width) * whole
    return kept


def exchange(work: Workload) -> Held:
    """Rows there and back: where they go, and the returned ones for their weights' gradient."""
    width = work.model.width
    sent, received = work.sent * width * work.whole, work.held * width * work.whole
    returned = work.sent * width * work.half
    # permute: rows of each token; unpermute: rows, weights, tokens
    kept = (2 * work.sent + work.own + 1) * INT + work.sent * work.whole
    if work.model.moe is not None and not isinstance(work.model.moe.router, HashConfig):
        kept += returned  # constant weights have no gradient
    remote = work.layout.ep * work.layout.etp > 1
    if remote:  # sorting by expert and back
        kept += 2 * (2 * work.held + 1) * INT
    if work.layout.etp > 1:
        kept += work.sent * INT
    forward = kept + (received if remote else sent)
    backward = sent + (received if remote else 0)
    return Held(kept, forward, backward)


def experts(work: Workload, count: int) -> Held:
    """The experts' rows and hidden values, and their weights where these are cast."""
    assert work.model.moe is not None
    config, layout = work.model.moe.experts, work.layout
    parts = ACTIVATIONS[config.activation].parts
    local, hidden = count // layout.ep, config.hidden // layout.etp
    width, half = work.model.width, work.half
    rows = padded = work.held
    if work.device == "cpu" and work.compute == "fp32":
        padded += local * (PADDED - 1) // 2  # of each expert between 0 and 31, by chance
    row = parts * hidden
    grouped = work.device == "cuda" and work.autocast
    if grouped:
        row += hidden
    weights = _weights(work, (parts + 1) * local * hidden * width)
    result = rows * width * half
    inner = padded * row * half
    kept = weights + result + (inner if work.recompute != "selective" else 0)
    forward = kept + result
    backward = 2 * result
    if grouped:
        backward += rows * (parts + 1) * hidden * half
        backward += inner if work.recompute == "selective" else 0
    return Held(kept, forward, backward)


PADDED = 32
"""Rows of an expert are padded to a multiple of this for oneDNN (see coterie.csrc.matmul)."""


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
    kept = norm(work) + joined * half + _weights(work, work.vocabulary * width)
    kept += logits * exact  # log-probabilities
    gathered = joined * work.whole if work.layout.tp > 1 and work.autocast else 0
    forward = kept + stream + gathered + logits * half + (logits * exact if work.autocast else 0)
    return Held(kept, forward, 2 * logits * exact)
