"""Bytes that the feed-forward half of a block holds for one micro-batch (see ``activations``).

It is dense, or a mixture: router, exchange and experts.
"""

from coterie.moe.activations import ACTIVATIONS
from coterie.moe.feed_forward import FeedForwardConfig
from coterie.moe.routers.expert_choice import ExpertChoiceConfig
from coterie.moe.routers.hash import HashConfig
from coterie.moe.routers.mlp import MLPConfig
from coterie.moe.routers.modality import ModalityConfig
from coterie.moe.routers.random_fixed import RandomFixedConfig
from coterie.moe.routers.sinkhorn import SinkhornConfig
from coterie.moe.routers.top_k import TopKConfig
from coterie.parallel.planner.activations import Held, cast_weights, norm
from coterie.parallel.planner.fused import fused
from coterie.parallel.planner.workload import INT, Workload

PADDED = 32
"""Rows of an expert are padded to a multiple of this for oneDNN (see coterie.csrc.matmul)."""


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
    kept = inputs + cast_weights(work, weights)
    if work.recompute != "selective":
        kept += inner
    gathered = joined * work.whole if work.layout.tp > 1 and work.autocast else 0
    out = joined * work.half * (2 if work.layout.tp > 1 else 1)
    forward = inputs + gathered + cast_weights(work, weights) + inner + out
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
    kept = joined * half + cast_weights(work, number * (parts + 1) * hidden * width)
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
    away = fused(work, count) if work.fused else exchange_and_experts(work, count)
    # a router that learns keeps its input, unless attention's half has kept it as it is
    learns = not isinstance(config.router, RandomFixedConfig | HashConfig)
    jitter = isinstance(config.router, TopKConfig) and config.router.jitter
    routed = learns and not (config.route_before_attention and not jitter)
    kept = norm(work) + routed * stream + routing + away.kept
    forward = norm(work) + stream + routing + away.forward
    backward = stream + away.backward
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


def exchange_and_experts(work: Workload, count: int) -> Held:
    """One after the other."""
    rows, inner = exchange(work), experts(work, count)
    return Held(
        rows.kept + inner.kept, rows.forward + inner.forward, rows.backward + inner.backward
    )


def router(work: Workload, experts_: int) -> int:
    """What the router keeps besides its input."""
    assert work.model.moe is not None
    match work.model.moe.router:
        case TopKConfig() as config:
            return _top_k(work, config, experts_)
        case HashConfig():
            return 0
        case RandomFixedConfig() | SinkhornConfig() as config:
            # scores, choices, and the order of rows
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
    weights = cast_weights(work, (parts + 1) * local * hidden * width)
    result = rows * width * half
    inner = padded * row * half
    kept = weights + result + (inner if work.recompute != "selective" else 0)
    forward = kept + result
    backward = 2 * result
    if grouped:
        backward += rows * (parts + 1) * hidden * half
        backward += inner if work.recompute == "selective" else 0
    return Held(kept, forward, backward)
