"""``dataset.json``: what a dataset directory holds, and the fingerprint that names its contents."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from coterie.core.config import Config
from coterie.core.errors import UserError, nearest
from coterie.data.vocabulary import Vocabulary

FILE = "dataset.json"
FORMAT = "coterie.dataset"
VERSION = 1

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(Config):
    """One file of packed rows: uint16, rows × (sequence + 1)."""

    file: str = Field(pattern=r"^[a-z_]+-\d{5}\.npy$")
    """Its plain name, in the dataset's directory."""

    rows: int = Field(ge=1)
    """Packed rows."""

    bytes: int = Field(ge=1)
    """The size of the file."""

    sha256: Digest
    """The checksum of the file."""


class Split(Config):
    """One split, and its counts."""

    shards: tuple[Shard, ...] = Field(min_length=1)
    """Its files, in order."""

    documents: Count
    """Documents packed."""

    tokens: Count
    """Tokens that are not padding."""

    image_tokens: Count
    """Tokens that are grey levels."""

    @property
    def rows(self) -> int:
        """Packed rows, over all shards."""
        return sum(shard.rows for shard in self.shards)


class Manifest(Config):
    """The contents of ``dataset.json``."""

    format: str = FORMAT
    """Always ``coterie.dataset``."""

    version: int = VERSION
    """The version of the layout on disk."""

    vocabulary: Vocabulary
    """What the ids mean."""

    sequence: int = Field(ge=1)
    """Tokens a model sees at once (S); a row is one longer."""

    splits: dict[str, Split] = Field(min_length=1)
    """``train``, and ``held_out`` if there is one."""

    recipe: dict[str, Any]
    """How it was made; no part of the fingerprint."""

    fingerprint: str
    """:meth:`contents` of the rest: equal for equal contents, wherever and whenever built."""

    def contents(self) -> str:
        """sha256 over vocabulary, sequence, counts and every shard's checksum."""
        facts = self.model_dump(mode="json", exclude={"recipe", "fingerprint"})
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def sealed(self) -> "Manifest":
        """The same with its fingerprint filled in."""
        return self.model_copy(update={"fingerprint": self.contents()})

    def split(self, name: str, where: Path) -> Split:
        """The split called ``name``; raises UserError when there is none."""
        if name not in self.splits:
            raise UserError(
                f"{where}: this dataset has no split '{name}', only "
                f"{' and '.join(self.splits)}{nearest(name, self.splits)}"
            )
        return self.splits[name]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of ``directory``; raises UserError naming the file and what is wrong with it."""
    file = directory / FILE
    found = _parse(file, _read(directory, file))
    if found.get("format") != FORMAT:
        raise UserError(f"{file}: is not the description of a dataset ('format' is not '{FORMAT}')")
    if found.get("version") != VERSION:
        raise UserError(
            f"{file}: format version {found.get('version')!r} cannot be read, only {VERSION}; "
            "build the dataset again with this version of coterie"
        )
    try:
        manifest = Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {key}: {first['msg']}; build the dataset again") from error
    if manifest.fingerprint != manifest.contents():
        raise UserError(
            f"{file}: was changed after it was built (its fingerprint does not match its "
            "contents); build the dataset again"
        )
    return manifest


def _read(directory: Path, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not directory.exists():
            raise UserError(f"{directory}: there is no such dataset directory") from error
        raise UserError(
            f"{directory}: holds no {FILE}, so it is no dataset; make one with 'coterie data build'"
        ) from error
    except NotADirectoryError as error:
        raise UserError(f"{directory}: is a file, not a dataset directory") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not JSON (nor even text)") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def _parse(file: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: is not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}: is nested too deeply to be a dataset's description") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds no JSON object, so it describes no dataset")
    return found
