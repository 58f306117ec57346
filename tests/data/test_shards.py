"""Datasets on disk: what goes in comes out, and every kind of damage is named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coterie.core.errors import UserError
from coterie.data.manifest import FILE, Manifest
from coterie.data.shards import TokenDataset, open_dataset
from coterie.data.vocabulary import Vocabulary
from coterie.data.writer import write_dataset

MakeDataset = Callable[..., Path]


def test_rows_come_back_from_all_shards_in_the_order_asked(dataset: TokenDataset) -> None:
    assert [shard.rows for shard in dataset.counts.shards] == [4, 4, 2]
    assert len(dataset) == 10
    index = np.array([9, 0, 4, 4, 7])
    rows = dataset.rows(index)
    assert rows.dtype == np.uint16
    np.testing.assert_array_equal(rows[:, 0], index)
    assert (rows[:, -1] == dataset.vocabulary.eod).all()
    dataset.verify()


@pytest.mark.parametrize("index", [-1, 10])
def test_a_row_outside_is_an_index_error(dataset: TokenDataset, index: int) -> None:
    with pytest.raises(IndexError, match="0 … 9"):
        dataset.rows(np.array([0, index]))


def test_the_counts_are_those_of_the_tokens(make_dataset: MakeDataset, tmp_path: Path) -> None:
    vocabulary = Vocabulary()
    image = np.zeros((8, 8), int)
    with write_dataset(tmp_path / "d", vocabulary, 99, {}) as writer:
        writer.add("train", vocabulary.join([vocabulary.captioned(image, "four")]))
    found = open_dataset(tmp_path / "d")
    assert (found.counts.documents, found.counts.tokens, found.counts.image_tokens) == (1, 71, 64)
    assert found.padding == pytest.approx(0.29)
    assert found.image_share == pytest.approx(64 / 71)


def test_the_fingerprint_is_of_the_contents(make_dataset: MakeDataset) -> None:
    first = open_dataset(make_dataset(name="a")).fingerprint
    assert open_dataset(make_dataset(name="b")).fingerprint == first
    assert open_dataset(make_dataset(name="c", first=1)).fingerprint != first
    assert open_dataset(make_dataset(name="d", sequence=8)).fingerprint != first


def test_one_byte_or_another_vocabulary_changes_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(name: str, tokens: list[int], side: int) -> str:
        vocabulary = Vocabulary(side=side)
        with write_dataset(tmp_path / name, vocabulary, 9, {}) as writer:
            writer.add("train", vocabulary.join([tokens]))
        return open_dataset(tmp_path / name).fingerprint

    found = [fingerprint(f"{i}", *args) for i, args in enumerate([([1], 8), ([2], 8), ([1], 9)])]
    assert len(set(found)) == 3


def test_splits_have_one_fingerprint_and_their_own_rows(make_dataset: MakeDataset) -> None:
    path = make_dataset()
    train, held = open_dataset(path), open_dataset(path, "held_out")
    assert train.fingerprint == held.fingerprint
    assert (len(train), len(held)) == (10, 3)


SHARD = "train-00001.npy"


def _edit(directory: Path, **changes: object) -> None:
    """Change the description and seal it again, as if it had been built so."""
    found = json.loads((directory / FILE).read_text()) | changes
    (directory / FILE).write_text(json.dumps(found))


def _reshard(directory: Path, tokens: np.ndarray) -> None:
    """Replace a shard, and describe its size and checksum truly."""
    import hashlib

    file = directory / SHARD
    with file.open("wb") as stream:
        np.save(stream, tokens)
    data = file.read_bytes()
    found = json.loads((directory / FILE).read_text())
    found["splits"]["train"]["shards"][1] |= {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    sealed = Manifest.model_validate(found).sealed()
    (directory / FILE).write_text(sealed.model_dump_json())


def _unlink_all(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def _in_place_of_directory(directory: Path) -> None:
    _unlink_all(directory)
    directory.write_text("a file")


def _cut(directory: Path) -> None:
    os.truncate(directory / SHARD, 100)


def _lengthen(directory: Path) -> None:
    with (directory / SHARD).open("ab") as stream:
        stream.write(b"\0")


def _overwrite_header(directory: Path) -> None:
    with (directory / SHARD).open("r+b") as stream:
        stream.write(b"garbage!")


def _shard_is_directory(directory: Path) -> None:
    (directory / SHARD).unlink()
    (directory / SHARD).mkdir()
    size = (directory / SHARD).stat().st_size
    found = json.loads((directory / FILE).read_text())
    found["splits"]["train"]["shards"][1]["bytes"] = size
    (directory / FILE).write_text(Manifest.model_validate(found).sealed().model_dump_json())


def _description_is_directory(directory: Path) -> None:
    (directory / FILE).unlink()
    (directory / FILE).mkdir()


def _outside(directory: Path) -> None:
    found = json.loads((directory / FILE).read_text())
    found["splits"]["train"]["shards"][0]["file"] = "../../etc/passwd"
    _edit(directory, splits=found["splits"])


Damage = Callable[[Path], object]
DAMAGES: list[tuple[str, Damage, str]] = [
    ("missing directory", _unlink_all, r"set: there is no such dataset directory"),
    ("file for directory", _in_place_of_directory, r"set: is a file, not a dataset directory"),
    ("no description", lambda d: (d / FILE).unlink(), r"set: holds no dataset\.json"),
    ("description is a directory", _description_is_directory, r"dataset\.json: cannot be read"),
    ("not JSON", lambda d: (d / FILE).write_text("{"), r"dataset\.json: is not JSON"),
    ("binary", lambda d: (d / FILE).write_bytes(b"\xff\xfe"), r"dataset\.json: is not JSON"),
    ("nested", lambda d: (d / FILE).write_text("[" * 10**5), r"dataset\.json: is nested too deep"),
    ("no object", lambda d: (d / FILE).write_text("[]"), r"dataset\.json: holds no JSON object"),
    ("other JSON", lambda d: (d / FILE).write_text("{}"), r"not the description of a dataset"),
    ("version", lambda d: _edit(d, version=2), r"format version 2 cannot be read, only 1"),
    ("edited", lambda d: _edit(d, sequence=8), r"dataset\.json: was changed after it was built"),
    ("bad value", lambda d: _edit(d, sequence="x"), r"dataset\.json: sequence: "),
    ("unknown key", lambda d: _edit(d, sequense=7), r"dataset\.json: sequense: "),
    ("no splits", lambda d: _edit(d, splits={}), r"dataset\.json: splits: "),
    ("path outside", _outside, r"dataset\.json: splits\.train\.shards\.0\.file: "),
    ("missing shard", lambda d: (d / SHARD).unlink(), rf"{SHARD}: is missing"),
    ("cut shard", _cut, rf"{SHARD}: is cut short: 100 bytes where dataset\.json says 192"),
    ("long shard", _lengthen, rf"{SHARD}: is too long: 193 bytes"),
    ("garbage shard", _overwrite_header, rf"{SHARD}: is no NumPy array"),
    ("shard is a directory", _shard_is_directory, rf"{SHARD}: cannot be read"),
    ("dtype", lambda d: _reshard(d, np.zeros((4, 8), "i8")), rf"{SHARD}: holds int64 of shape"),
    ("shape", lambda d: _reshard(d, np.zeros((5, 8), "u2")), rf"{SHARD}: holds .*\(5, 8\) where"),
    ("pickle", lambda d: _reshard(d, np.array([{}] * 9)), rf"{SHARD}: is no NumPy array"),
]


@pytest.mark.parametrize(
    ("damage", "words"), [(d, w) for _, d, w in DAMAGES], ids=[name for name, _, _ in DAMAGES]
)
def test_damage_is_named_when_the_dataset_is_opened(
    make_dataset: MakeDataset, damage: Damage, words: str
) -> None:
    path = make_dataset()
    damage(path)
    with pytest.raises(UserError, match=words) as caught:
        open_dataset(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_changed_byte_is_found_by_verify(make_dataset: MakeDataset) -> None:
    path = make_dataset()
    with (path / SHARD).open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\x07")
    dataset = open_dataset(path)  # the size is right
    with pytest.raises(UserError, match=rf"{SHARD}: its checksum is not the one"):
        dataset.verify()


def test_ids_outside_the_vocabulary_are_found_by_verify(make_dataset: MakeDataset) -> None:
    path = make_dataset()
    _reshard(path, np.full((4, 8), 263, "u2"))
    dataset = open_dataset(path)
    with pytest.raises(UserError, match=rf"{SHARD}: holds the token id 263.*ends at 262"):
        dataset.verify()


def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    vocabulary = Vocabulary()
    with (
        pytest.raises(UserError, match=r"id 277, and the vocabulary ends at 276"),
        write_dataset(tmp_path / "d", vocabulary, 9, {}) as writer,
    ):
        writer.add("train", np.array([277, vocabulary.eod], dtype=np.uint16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokens", [[], [1, 2]])
def test_a_document_without_its_end_is_a_mistake_of_ours(tmp_path: Path, tokens: list[int]) -> None:
    with (
        pytest.raises(ValueError, match="ends in EOD"),
        write_dataset(tmp_path / "d", Vocabulary(), 9, {}) as writer,
    ):
        writer.add("train", np.array(tokens, dtype=np.uint16))


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="nothing to train on"),
        write_dataset(tmp_path / "d", Vocabulary(), 9, {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_split_is_named_with_the_nearest(make_dataset: MakeDataset) -> None:
    with pytest.raises(UserError, match=r"no split 'heldout'.*did you mean 'held_out'"):
        open_dataset(make_dataset(), "heldout")


@pytest.mark.parametrize("name", [SHARD, FILE])
def test_a_file_without_permission_is_named(make_dataset: MakeDataset, name: str) -> None:
    path = make_dataset()
    (path / name).chmod(0)
    code = f"from coterie.data.shards import open_dataset; open_dataset({str(path)!r})"
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:  # root may read every file, unless it gives that up
        if not shutil.which("setpriv"):
            pytest.skip("root without setpriv cannot give up reading every file")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"UserError: {path / name}: cannot be read: Permission denied" in done.stderr
