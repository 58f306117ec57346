"""Reading a dataset: one split's memory-mapped token shards, checked when they are opened."""

import hashlib
from pathlib import Path

import numpy as np

from coterie.core.errors import UserError
from coterie.data.manifest import Manifest, Shard, read_manifest
from coterie.data.order import Indices
from coterie.data.vocabulary import Tokens, Vocabulary

DTYPE = np.dtype("<u2")


class TokenDataset:
    """One split of a dataset on disk; rows are read when asked for, never all at once."""

    def __init__(self, path: Path, split: str, manifest: Manifest, shards: list[Tokens]) -> None:
        self.path = path
        self.split = split
        self.manifest = manifest
        self.counts = manifest.split(split, path)
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids mean."""
        return self.manifest.vocabulary

    @property
    def sequence(self) -> int:
        """Tokens a model sees at once (S)."""
        return self.manifest.sequence

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that name the contents of the whole dataset, all splits."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        """Packed rows."""
        return int(self._ends[-1])

    @property
    def padding(self) -> float:
        """The share of the rows that is padding."""
        return 1 - self.counts.tokens / (len(self) * (self.sequence + 1))

    @property
    def image_share(self) -> float:
        """The share of the tokens (padding not counted) that are grey levels."""
        return self.counts.image_tokens / self.counts.tokens

    def rows(self, index_B: Indices) -> Tokens:
        """The packed rows (B × S+1, uint16) with these numbers, in this order.

        Raises IndexError for a number outside 0 … len - 1.
        """
        if index_B.size and (index_B.min() < 0 or index_B.max() >= len(self)):
            raise IndexError(f"rows are 0 … {len(self) - 1}")
        found = np.empty((len(index_B), self.sequence + 1), dtype=np.uint16)
        shard_B = np.searchsorted(self._ends, index_B, side="right")
        for number in np.unique(shard_B):
            here = shard_B == number
            shard = self._shards[number]
            found[here] = shard[index_B[here] - (self._ends[number] - len(shard))]
        return found

    def verify(self) -> None:
        """Read everything and compare checksums and ids; raises UserError naming a bad file."""
        for shard, tokens in zip(self.counts.shards, self._shards, strict=True):
            file = self.path / shard.file
            if _sha256(file) != shard.sha256:
                raise UserError(
                    f"{file}: its checksum is not the one in dataset.json, so it was changed or "
                    "damaged after it was built; build the dataset again"
                )
            if (largest := int(tokens.max())) >= self.vocabulary.size:
                raise UserError(
                    f"{file}: holds the token id {largest}, and the vocabulary ends at "
                    f"{self.vocabulary.size - 1}"
                )


def open_dataset(path: str | Path, split: str = "train") -> TokenDataset:
    """Open one split (``train`` or ``held_out``) of the dataset directory ``path``.

    Checks the description, its fingerprint, and each shard's size, type and shape; not each byte:
    :meth:`TokenDataset.verify` does. Raises UserError naming the file at fault.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    shards = manifest.split(split, directory).shards
    return TokenDataset(
        directory, split, manifest, [_map(directory, shard, manifest.sequence) for shard in shards]
    )


def _map(directory: Path, shard: Shard, sequence: int) -> Tokens:
    file = directory / shard.file
    try:
        size = file.stat().st_size
        if size != shard.bytes:
            what = "cut short" if size < shard.bytes else "too long"
            raise UserError(
                f"{file}: is {what}: {size} bytes where dataset.json says {shard.bytes}; "
                "build the dataset again"
            )
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{file}: is missing; build the dataset again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{file}: is no NumPy array of token ids ({error})") from error
    expected = (shard.rows, sequence + 1)
    if tokens.dtype != DTYPE or tokens.shape != expected:
        raise UserError(
            f"{file}: holds {tokens.dtype} of shape {tokens.shape} where dataset.json says uint16 "
            f"of shape {expected}; build the dataset again"
        )
    return tokens


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
