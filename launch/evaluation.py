"""`coterie evaluate`: held-out loss of a checkpoint, and how many of its digits can be read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coterie.core.errors import UserError
from coterie.data import TokenDataset
from coterie.data.digits import NAMES, caption, split_digits
from coterie.launch.assemble import build_model, open_data
from coterie.launch.causality import require_causal
from coterie.launch.config import RunConfig
from coterie.launch.images import image_drawer
from coterie.launch.run_checkpoints import CHECKPOINTS, choose_checkpoint
from coterie.parallel.checkpoint import load_tensors, read_state
from coterie.parallel.distributed import start, world_from_environment
from coterie.parallel.evaluate import evaluate as held_out_loss
from coterie.parallel.layout import Layout, LayoutConfig
from coterie.parallel.model import ParallelModel
from coterie.parallel.precision import Precision, resolve
from coterie.parallel.run_state import model_parts

_LOSS = (
    "its held-out loss is not that of a causal model",
    "ask for that figure with --non-causal",
)


@dataclass(frozen=True)
class Loaded:
    """A trained model in this one process, with all its experts."""

    model: ParallelModel
    train: TokenDataset
    held_out: TokenDataset
    checkpoint: Path


def load_model(config: RunConfig, run_dir: Path, step: int | None) -> Loaded:
    """The model of ``run_dir`` at ``step`` (None: newest), whatever layout trained it.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if world_from_environment()[1] > 1:
        raise UserError(
            "evaluate and generate run in one process: start them without torchrun and srun"
        )
    checkpoint = choose_checkpoint(run_dir, step)
    if checkpoint is None:
        raise UserError(f"{run_dir / CHECKPOINTS} holds no checkpoint yet")
    ranks = start(Layout(), config.train.timeout)
    train, held_out = open_data(config.data, ranks)
    trained_on = read_state(checkpoint)["sampler"]["fingerprint"]
    if trained_on != train.fingerprint:
        raise UserError(
            f"{checkpoint} was trained on a dataset with fingerprint {trained_on[:16]}, and "
            f"{train.path} has {train.fingerprint[:16]}: its held-out part may be "
            "training data; bring back the dataset (the built-in one depends on Python's version)"
        )
    alone = config.model_copy(update={"parallel": LayoutConfig()})
    model = build_model(alone, ranks)
    load_tensors(checkpoint, model_parts(model), strict=False)
    return Loaded(model, train, held_out, checkpoint)


def losses_by_k(
    config: RunConfig, run_dir: Path, step: int | None, wanted: str, non_causal: bool = False
) -> dict[int, dict[str, float]]:
    """Held-out losses with other numbers of experts for each token; ``wanted``: ``1,2,4``.

    Raises:
        UserError: these are no numbers, or the router cannot take so many; as :func:`evaluate`.
    """
    numbers = _numbers(wanted)
    for k in numbers:
        _check_k(config, k)
    if not non_causal:
        require_causal(config.model, run_dir, _LOSS)
    loaded = load_model(config, run_dir, step)
    precision, settings = precision_of(config, loaded), config.evaluation
    return {
        k: held_out_loss(
            loaded.model, loaded.held_out, precision, settings.batch, settings.sequences, k
        )
        for k in numbers
    }


def _numbers(wanted: str) -> list[int]:
    try:
        return [int(part) for part in wanted.split(",")]
    except ValueError:
        raise UserError(f"--k {wanted}: write whole numbers with commas, as in --k 1,2,4") from None


def _check_k(config: RunConfig, k: int) -> None:
    model = config.model
    if model.moe is None:
        raise UserError(f"--k {k}: the model has no experts (model.moe is null)")
    for count in {model.experts_of(layer) for layer in range(model.layers) if model.is_moe(layer)}:
        try:
            model.moe.router.check_k(k, count)
        except ValueError as error:
            raise UserError(f"--k {k}: {error}") from None


def evaluate(
    config: RunConfig, run_dir: Path, step: int | None, non_causal: bool = False
) -> dict[str, float]:
    """Held-out losses (nats per token); for the digits corpus also ``digits``: of ten captions, how
    many give an image that a classifier trained on real digits reads as what was asked for.

    Raises:
        UserError: routers look at later tokens, and ``non_causal`` does not ask for such losses.
    """
    if not non_causal:
        require_causal(config.model, run_dir, _LOSS)
    loaded = load_model(config, run_dir, step)
    metrics = held_out_loss(
        loaded.model,
        loaded.held_out,
        precision_of(config, loaded),
        config.evaluation.batch,
        config.evaluation.sequences,
    )
    digits = config.data.path is None and config.data.corpus == "digits"
    if digits and config.model.causal:  # another cannot draw
        metrics["digits"] = float(recognised(draw_digits(config, loaded), config.data.held_out))
    return metrics


def draw_digits(config: RunConfig, loaded: Loaded) -> dict[str, npt.NDArray[np.int64]]:
    """One image for each of the ten captions, as drawn during training."""
    captions = [caption(digit) for digit in range(10)]
    draw = image_drawer(
        captions,
        loaded.train.vocabulary,
        precision_of(config, loaded),
        config.evaluation.temperature,
        config.train.seed,
    )
    return draw(loaded.model)


def precision_of(config: RunConfig, loaded: Loaded) -> Precision:
    """What the model computes in here."""
    return resolve(config.train.precision, loaded.model.ranks.device)


def recognised(images: dict[str, npt.NDArray[np.int64]], held_out: float) -> int:
    """How many ``images``, by caption, are read as their caption by a support-vector machine
    trained on the real training digits (98% right on real digits)."""
    from sklearn.svm import SVC  # slow to import, and needed only here

    digits, _ = split_digits(held_out)
    reader = SVC(gamma=0.001).fit(digits.image_NHW.reshape(len(digits), -1), digits.label_N)
    return sum(
        int(reader.predict(image.reshape(1, -1))[0]) == NAMES.index(asked.removeprefix("a digit "))
        for asked, image in images.items()
    )
