"""Rules that join a config with the number of processes and the dataset.

All are checked before any process is started.
"""

from pathlib import Path

from coterie.core.errors import UserError
from coterie.data.manifest import Manifest, read_manifest
from coterie.data.vocabulary import MODALITIES, Vocabulary
from coterie.launch.config import RunConfig
from coterie.moe.routers.modality import ModalityConfig
from coterie.parallel.layout import Layout
from coterie.parallel.rules import layout_of


def check_world(config: RunConfig, world: int) -> None:
    """Raises UserError when ``world`` processes cannot run ``config``."""
    layout = layout_of(config.parallel, world, config.model)
    train, batch = config.train, config.evaluation.batch
    if train.global_batch % (train.accumulation * layout.dp):
        raise UserError(
            f"train.global_batch is {train.global_batch}, but must be a multiple of "
            f"train.accumulation {train.accumulation} × {_data_parallel(layout)}: use "
            f"{_multiple_near(train.global_batch, train.accumulation * layout.dp)}"
        )
    if batch % layout.dp:
        raise UserError(
            f"evaluation.batch is {batch}, but must be a multiple of {_data_parallel(layout)}: "
            f"use {_multiple_near(batch, layout.dp)}"
        )
    unit = layout.tp * layout.cp * (2 if layout.cp > 1 else 1)
    if config.data.sequence % unit:
        raise UserError(
            f"data.sequence is {config.data.sequence}, but must be a multiple of {unit} for tp "
            f"{layout.tp} and cp {layout.cp}: use {_multiple_near(config.data.sequence, unit)}"
        )
    if layout.schedule == "1f1b" and train.accumulation < layout.pp:
        raise UserError(
            f"train.accumulation is {train.accumulation}, but a pipeline of {layout.pp} ranks "
            f"needs as many micro-batches: use {layout.pp} or more"
        )
    if layout.schedule != "1f1b" and train.accumulation % layout.pp:
        raise UserError(
            f"train.accumulation is {train.accumulation}, but schedule {layout.schedule} over "
            f"{layout.pp} ranks needs a multiple of {layout.pp} micro-batches: use "
            f"{_multiple_near(train.accumulation, layout.pp)}"
        )


def _data_parallel(layout: Layout) -> str:
    return f"{layout.dp} data-parallel rank{'s' if layout.dp > 1 else ''}"


def check_data(config: RunConfig) -> None:
    """Raises UserError when the dataset is missing or does not fit the model.

    A vocabulary larger than the data's is accepted: its other ids stay untrained.
    """
    if config.data.path is None:
        where, size = "the built-in corpus", Vocabulary().size
    else:
        manifest = _manifest(Path(config.data.path))
        where, size = config.data.path, manifest.vocabulary.size
        if manifest.sequence != config.data.sequence:
            raise UserError(
                f"data.sequence is {config.data.sequence}, but {where} is packed to sequences of "
                f"{manifest.sequence} tokens: set data.sequence={manifest.sequence}, or build it "
                "again"
            )
    if config.model.vocabulary < size:
        raise UserError(
            f"model.vocabulary is {config.model.vocabulary}, but {where} has {size} token ids: "
            f"set model.vocabulary={size}, or more"
        )
    untie, known = config.model.untie, len(MODALITIES)
    if untie.any and untie.modalities < known:
        raise UserError(
            f"model.untie.modalities is {untie.modalities}, but {where} has tokens of {known} "
            f"modalities ({', '.join(MODALITIES)}): set model.untie.modalities={known}, or more"
        )
    router = config.model.moe.router if config.model.moe else None
    if isinstance(router, ModalityConfig) and len(router.experts) < known:
        raise UserError(
            f"model.moe.router.experts names {len(router.experts)}, but {where} has tokens of "
            f"{known} modalities ({', '.join(MODALITIES)}): give each a number of experts"
        )


def _manifest(path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except UserError as error:
        make = "" if path.exists() else f"; make it: coterie data build SOURCE {path}"
        raise UserError(f"data.path: {error}{make}") from error


def _multiple_near(number: int, factor: int) -> str:
    below = number // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)
