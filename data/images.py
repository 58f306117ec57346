"""Images from files, as square arrays of grey levels."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from coterie.core.errors import UserError


def read_image(file: Path, side: int, levels: int) -> npt.NDArray[np.int64]:
    """The image in ``file`` (PNG, JPEG …): ``side`` × ``side`` levels of grey.

    Levels go from 0 (black) to ``levels`` - 1 (white). A picture
    that is not square is squeezed. Raises UserError, naming the file, when it is no image or cannot
    be read, or when Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError(f"{file}: reading images needs Pillow: pip install pillow") from error
    try:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # 16 bits; convert("L") would clip, not scale
                wide = np.asarray(upright, dtype=np.float64) / 257
                upright = Image.fromarray(wide.clip(0, 255).astype(np.uint8))
            grey = upright.convert("L").resize((side, side), Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot be read as an image: {reason}") from error
    return np.rint(np.asarray(grey, dtype=np.float64) / 255 * (levels - 1)).astype(np.int64)


def to_grey(image_HW: npt.NDArray[np.integer], levels: int) -> npt.NDArray[np.uint8]:
    """Levels 0 … ``levels`` - 1 as grey 0 … 255, black to white."""
    return np.rint(image_HW * (255 / (levels - 1))).astype(np.uint8)
