"""Continuations of prompts during training, and the images among them."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coterie.comm.objects import gather_objects
from coterie.data import Vocabulary
from coterie.models.generate import generate
from coterie.parallel.forward import whole_logits
from coterie.parallel.model import ParallelModel
from coterie.parallel.precision import Precision
from coterie.parallel.trainer import DrawImages

_TEXT_ROOM = 16  # new tokens allowed besides one image and its markers


def encode_prompt(prompt: str, vocabulary: Vocabulary) -> Tensor:
    """int64 ids of a text prompt."""
    return torch.from_numpy(vocabulary.encode_text(prompt).astype(np.int64))


def first_image(tokens: Tensor, vocabulary: Vocabulary) -> npt.NDArray[np.int64] | None:
    """The first complete image among ``tokens``, (side, side) levels, or None."""
    pieces = vocabulary.decode(tokens.cpu().numpy())
    return next((p for p in pieces if isinstance(p, np.ndarray) and p.ndim == 2), None)


def image_drawer(
    prompts: Sequence[str],
    vocabulary: Vocabulary,
    precision: Precision,
    temperature: float,
    seed: int,
) -> DrawImages:
    """Draws one image for each prompt, the prompts split over the data-parallel ranks."""

    def draw(model: ParallelModel) -> dict[str, npt.NDArray[np.int64]]:
        ranks = model.ranks
        mine = range(ranks.place.dp, len(prompts), ranks.layout.dp)
        was_training = model.training
        model.eval()
        continued = generate(
            partial(whole_logits, model, precision=precision),
            [encode_prompt(prompts[number], vocabulary).to(ranks.device) for number in mine],
            mine,
            stop=[vocabulary.eoi, vocabulary.eod],
            length=vocabulary.codes_per_image + 2 + _TEXT_ROOM,
            temperature=temperature,
            seed=seed,
            vocabulary=vocabulary.size,
            modality=vocabulary.modality,
            device=ranks.device,
            group=ranks.everyone,
        )
        model.train(was_training)
        found = {n: first_image(t, vocabulary) for n, t in zip(mine, continued, strict=True)}
        parts = gather_objects(found, ranks.control)
        images = {n: image for part in parts for n, image in part.items() if image is not None}
        return {prompts[number]: images[number] for number in sorted(images)}

    return draw
