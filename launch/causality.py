"""What may be said of a model that looks at later tokens."""

from pathlib import Path

from coterie.core.errors import UserError
from coterie.models import DecoderConfig


def can_foresee(model: DecoderConfig) -> bool:
    """Whether auxiliary routers can make ``model`` causal, which it is not."""
    router = model.moe.router if model.moe is not None else None
    routes = router is None or router.causal or "auxiliary" in type(router).model_fields
    return routes and not model.causal


def who_looks_ahead(model: DecoderConfig) -> str:
    """The beginning of a sentence: what it is in ``model`` that looks at later tokens."""
    found = []
    if model.moe is not None and not model.moe.router.causal:
        found.append(f"router {model.moe.router.kind}")
    if model.mixture_of_depths is not None and not model.mixture_of_depths.causal:
        found.append("mixture_of_depths")
    return f"{' and '.join(found)} {'looks' if len(found) == 1 else 'look'} at later tokens"


def require_causal(model: DecoderConfig, run_dir: Path, so: tuple[str, ...]) -> None:
    """Raise UserError unless ``model`` is causal in evaluation. ``so``: what follows if it is not,
    and what else can be done about it."""
    if model.causal:
        return
    follows, *ways = so
    if can_foresee(model):
        ways.insert(0, f"train auxiliary routers, by 'coterie train {run_dir} --stage aux'")
    advice = f"; {', or '.join(ways)}" if ways else ""
    raise UserError(f"{run_dir}: {who_looks_ahead(model)}, so {follows}{advice}")
