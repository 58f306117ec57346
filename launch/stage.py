"""`coterie train RUN --stage aux`: the config of a second stage, out of the run it goes on from."""

from pathlib import Path
from typing import Any

from coterie.core.errors import UserError
from coterie.launch.causality import can_foresee, who_looks_ahead
from coterie.launch.config import RunConfig
from coterie.launch.load_config import changed_config, load_config
from coterie.launch.run_checkpoints import stage_checkpoint
from coterie.launch.run_folder import saved_config
from coterie.models import DecoderConfig
from coterie.parallel.checkpoint_format import step_of
from coterie.parallel.config import StageConfig

_OPTIMIZER = {"lr": 1e-4, "final_lr": 0.01, "decay": "linear"}
"""MoMa's: 1e-4 → 1e-6."""
_WARMUP = 5
"""Steps to one of warm-up: 10,000 to 2,000."""
_WARMUP_KEYS = ("optimizer", "optimizer.warmup")
"""Overrides that say how long it is."""


def stage_config(stage: str, run_dir: Path, overrides: list[str]) -> RunConfig:
    """The config of ``stage`` for the run in ``run_dir``: that run's, but for its name, the
    optimizer and what the stage says; then ``overrides``.

    Raises:
        UserError: there is no such stage or run; it has no checkpoint, or nothing to foresee.
    """
    if stage != "aux":
        raise UserError(f"--stage is '{stage}', but must be aux")
    file = saved_config(run_dir)
    before = load_config(file)
    if before.stage is not None:
        raise UserError(
            f"{run_dir}: is a run of stage {before.stage.kind} itself; go on with it by 'coterie "
            f"resume {run_dir}'"
        )
    if before.model.causal:
        raise UserError(
            f"{run_dir}: its model is causal as it is, so --stage aux has nothing to do"
        )
    if not can_foresee(before.model):
        raise UserError(
            f"{run_dir}: {who_looks_ahead(before.model)}, which no auxiliary router can foresee; "
            "they are for experts that choose (modality, expert_choice)"
        )
    run = str(run_dir.resolve())
    checkpoint = stage_checkpoint(StageConfig(weights=run))
    tree: dict[str, Any] = before.model_dump(mode="json") | {
        "name": f"{before.name}-aux",
        "model": _with_auxiliary(before.model).model_dump(mode="json"),
        "optimizer": {**_OPTIMIZER, "warmup": 0},  # until the steps are known
        "stage": {"kind": "aux", "weights": run, "step": step_of(checkpoint)},
    }
    config = changed_config(file, tree, overrides)
    if any(key.partition("=")[0].strip() in _WARMUP_KEYS for key in overrides):
        return config
    optimizer = config.optimizer.model_copy(update={"warmup": config.train.steps // _WARMUP})
    return config.model_copy(update={"optimizer": optimizer})


def check_stage(config: RunConfig) -> None:
    """Raises UserError when the run that ``config.stage`` names has no such checkpoint, or is of
    another model."""
    if config.stage is None:
        return
    run_dir = Path(config.stage.weights)
    first = load_config(saved_config(run_dir))
    stage_checkpoint(config.stage)
    if not can_foresee(first.model) or _with_auxiliary(first.model) != config.model:
        keys = "model.moe.router.auxiliary"
        if config.model.mixture_of_depths is not None:
            keys += " and model.mixture_of_depths.auxiliary"
        raise UserError(
            f"stage.weights: the model of {run_dir} is another than this one; only {keys} may "
            "differ"
        )


def _with_auxiliary(model: DecoderConfig) -> DecoderConfig:
    """``model`` with auxiliary routers wherever something looks at later tokens."""
    changes: dict[str, Any] = {}
    moe, depths = model.moe, model.mixture_of_depths
    if moe is not None and not moe.router.causal:
        router = moe.router.model_copy(update={"auxiliary": True})
        changes["moe"] = moe.model_copy(update={"router": router})
    if depths is not None and not depths.causal:
        changes["mixture_of_depths"] = depths.model_copy(update={"auxiliary": True})
    return model.model_copy(update=changes)
