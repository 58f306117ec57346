"""`coterie generate`: continue a prompt; text to the terminal, images to PNG files."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from coterie.core.errors import UserError
from coterie.launch.causality import require_causal
from coterie.launch.config import RunConfig
from coterie.launch.evaluation import load_model, precision_of
from coterie.launch.images import encode_prompt
from coterie.models.generate import generate as continue_prompts
from coterie.parallel.forward import whole_logits

_ZOOM = 32  # an 8 × 8 image as 256 × 256 pixels


@dataclass(frozen=True)
class Continuation:
    """What one sample became."""

    text: str
    images: list[Path]


def generate(
    config: RunConfig,
    run_dir: Path,
    prompt: str,
    *,
    count: int,
    length: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    out: Path,
    step: int | None,
) -> list[Continuation]:
    """``count`` continuations of ``prompt`` until the end of the document or ``length`` new tokens.

    Raises:
        UserError: the prompt is empty or too long, or ``out`` cannot be written; routers look at
            later tokens.
    """
    require_causal(config.model, run_dir, ("it cannot generate, which is without later tokens",))
    if not prompt:
        raise UserError(
            "the prompt is empty: give at least one character, as in --prompt 'a digit'"
        )
    loaded = load_model(config, run_dir, step)
    vocabulary = loaded.train.vocabulary
    tokens = encode_prompt(prompt, vocabulary)
    device = loaded.model.ranks.device
    loaded.model.eval()
    samples = continue_prompts(
        partial(whole_logits, loaded.model, precision=precision_of(config, loaded)),
        [tokens.to(device)] * count,
        range(count),
        stop=[vocabulary.eod],
        length=length,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        vocabulary=vocabulary.size,
        modality=vocabulary.modality,
        device=device,
    )
    results = []
    for number, sample in enumerate(samples):
        pieces = vocabulary.decode(sample.cpu().numpy())
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        images = [piece for piece in pieces if isinstance(piece, np.ndarray) and piece.ndim == 2]
        paths = [
            _save(image, vocabulary.levels, out / f"{_slug(prompt)}-{number}-{place}.png")
            for place, image in enumerate(images)
        ]
        results.append(Continuation(text, paths))
    return results


def _slug(prompt: str) -> str:
    """A file name from the prompt: letters and digits, others as one dash, at most 40."""
    words = "".join(c if c.isalnum() and c.isascii() else " " for c in prompt).split()
    return "-".join(words)[:40] or "sample"


def _save(image_HW: np.ndarray, levels: int, path: Path) -> Path:
    grey_HW = (image_HW * 255 // (levels - 1)).astype(np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey_HW).resize(
            (grey_HW.shape[1] * _ZOOM, grey_HW.shape[0] * _ZOOM), Image.Resampling.NEAREST
        ).save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path
