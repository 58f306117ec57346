"""What may be said of a model that looks at later tokens."""

from pathlib import Path

from coterie.core.errors import UserError
from coterie.models import DecoderConfig


def looks_ahead(model: DecoderConfig) -> str:
    """What in a ``model`` that is not causal looks at later tokens, as the start of a sentence."""
    parts = []
    if model.moe is not None and not model.moe.router.causal:
        parts.append(f"router {model.moe.router.kind}")
    if model.mixture_of_depths is not None and not model.mixture_of_depths.causal:
        parts.append("mixture_of_depths")
    return f"{' and '.join(parts)} {'look' if len(parts) > 1 else 'looks'} at later tokens"


def can_foresee(model: DecoderConfig) -> bool:
    """Whether auxiliary routers can make ``model`` causal."""
    return model.moe is not None and "auxiliary" in type(model.moe.router).model_fields


def require_causal(model: DecoderConfig, run_dir: Path, so: tuple[str, ...]) -> None:
    """Raise UserError unless ``model`` is causal in evaluation. ``so``: what follows if it is not,
    and what else can be done about it."""
    if model.causal:
        return
    follows, *ways = so
    if can_foresee(model):
        ways.insert(0, f"train auxiliary routers, by 'coterie train {run_dir} --stage aux'")
    elif model.mixture_of_depths is not None and not model.mixture_of_depths.causal:
        ways.insert(0, "train with model.mixture_of_depths.predictor=true")
    advice = f"; {', or '.join(ways)}" if ways else ""
    raise UserError(f"{run_dir}: {looks_ahead(model)}, so {follows}{advice}")
