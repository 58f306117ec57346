"""What may be said of a model whose routers look at later tokens."""

from pathlib import Path

from coterie.core.errors import UserError
from coterie.models import DecoderConfig


def can_foresee(model: DecoderConfig) -> bool:
    """Whether auxiliary routers can make ``model`` causal."""
    return model.moe is not None and "auxiliary" in type(model.moe.router).model_fields


def require_causal(model: DecoderConfig, run_dir: Path, so: tuple[str, ...]) -> None:
    """Raise UserError unless ``model`` is causal in evaluation. ``so``: what follows if it is not,
    and what else can be done about it."""
    if model.causal or model.moe is None:
        return
    follows, *ways = so
    if can_foresee(model):
        ways.insert(0, f"train auxiliary routers, by 'coterie train {run_dir} --stage aux'")
    advice = f"; {', or '.join(ways)}" if ways else ""
    raise UserError(
        f"{run_dir}: router {model.moe.router.kind} looks at later tokens, so {follows}{advice}"
    )
