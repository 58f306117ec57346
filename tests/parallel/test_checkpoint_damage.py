"""Damaged and hostile checkpoints end in one sentence, on every rank, and execute nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from coterie.core.errors import UserError
from coterie.parallel.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    list_checkpoints,
    load_tensors,
    read_manifest,
    read_state,
    verify,
)
from coterie.parallel.checkpoint_format import checksum
from coterie.parallel.checkpoint_store import write_file
from coterie.parallel.part import Part
from tests.distributed import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TENSORS = {"w": torch.arange(12.0).reshape(3, 4), "n": torch.tensor(5)}
RANK_FILE = "rank_00000.safetensors"


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """The newer of the two checkpoints, of steps 10 and 20, of the run ``tmp_path/run``."""
    folder = tmp_path / "run" / "checkpoints"
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, wholes(TENSORS), {"step": step})
    return folder / "step_00000020"


def wholes(tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
    return {name: Part.whole(tensor) for name, tensor in tensors.items()}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def load(path: Path) -> dict[str, torch.Tensor]:
    into = {name: torch.full_like(x, -1) for name, x in TENSORS.items()}
    load_tensors(path, wholes(into))
    return into


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as a forger would: its checksum is right again."""
    envelope = json.loads((path / "manifest.json").read_text())
    change(envelope)
    envelope["checksum"] = checksum(envelope["manifest"])
    (path / "manifest.json").write_text(json.dumps(envelope))


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("name", [RANK_FILE, "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        lengthen,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        become_pipe,
        become_link,
        lambda path: flip(path, 3),
        lambda path: flip(path, -3),
    ],
    ids=["truncate", "lengthen", "unlink", "empty", "pipe", "link", "flip-start", "flip-end"],
)
def test_each_file_harmed_in_each_way(
    newest: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(newest / name)
    for read in (verify, load):
        with pytest.raises(UserError) as error:
            read(newest)
        text = one_sentence(error)
        assert f"checkpoint {newest} is damaged: " in text
        assert name in text
        assert f"coterie resume {newest.parent.parent} --step 10" in text
    verify(newest.parent / "step_00000010")


def test_the_bytes_of_the_manifest_count(newest: Path) -> None:
    manifest, file = read_manifest(newest), newest / "manifest.json"
    good = file.read_bytes()
    for position in range(0, len(good), 3):
        flip(file, position)
        try:
            assert read_manifest(newest) == manifest  # white space
        except UserError as error:
            assert "\n" not in str(error)
        file.write_bytes(good)


def test_the_bytes_of_the_tensors_count(newest: Path) -> None:
    file = newest / RANK_FILE
    good = file.read_bytes()
    for position in range(0, len(good), 7):
        flip(file, position)
        with pytest.raises(UserError, match=RANK_FILE):
            load(newest)
        file.write_bytes(good)


def test_when_no_other_is_good_the_error_says_so(newest: Path) -> None:
    for path in list_checkpoints(newest.parent):
        truncate(path / RANK_FILE)
    with pytest.raises(UserError, match=f"there is no other undamaged one in {newest.parent}"):
        load(newest)


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda e: e.update(version=3), "format version 3, written by a newer coterie"),
    "older": (lambda e: e.update(version=1), "format version 1, written by an older coterie"),
    "never": (lambda e: e.update(version=0), "format version 0, which never existed"),
    "text": (lambda e: e.update(version="2"), "is not a manifest"),
    "other": (lambda e: e.update(format="zip"), "is not a manifest"),
    "step": (lambda e: e["manifest"].update(step=21), "is of step 21, not 20"),
    "extra": (lambda e: e["manifest"].update(evil=1), "evil"),
    "outside": (
        lambda e: e["manifest"]["files"].update({"../x": {"size": 1, "sha256": ""}}),
        "lists its files wrongly: '../x'",
    ),
    "no state": (lambda e: e["manifest"]["files"].pop("state.json"), "state.json"),
    "hole": (
        lambda e: e["manifest"]["tensors"]["w"]["chunks"][0].update(shape=[2, 4]),
        "the chunks of tensor 'w' in manifest.json do not cover it",
    ),
    "beyond": (
        lambda e: e["manifest"]["tensors"]["w"]["chunks"][0].update(offset=[1, 0]),
        "places a chunk of tensor 'w' wrongly",
    ),
    "twice": (
        lambda e: e["manifest"]["tensors"]["w"]["chunks"].__setitem__(
            slice(None), 2 * [{"file": RANK_FILE, "offset": [0, 0], "shape": [3, 2]}]
        ),
        "the chunks of tensor 'w' in manifest.json do not cover it",
    ),
    "digest": (lambda e: e["manifest"]["tensors"]["w"].update(digest="12"), "tensors.w.digest"),
    "file": (
        lambda e: e["manifest"]["tensors"]["w"]["chunks"][0].update(file="passwd"),
        "places a chunk of tensor 'w' wrongly",
    ),
    "dtype": (lambda e: e["manifest"]["tensors"]["w"].update(dtype="load"), "is load in"),
    "name": (
        lambda e: e["manifest"]["tensors"].update(v=e["manifest"]["tensors"].pop("w")),
        "has no tensor 'w'",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_manifests_that_lie(newest: Path, name: str) -> None:
    change, sentence = FORGERIES[name]
    rewrite(newest, change)
    with pytest.raises(UserError) as error:
        load(newest)
    assert sentence in one_sentence(error)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_manifest_that_is_something_else(newest: Path, content: bytes) -> None:
    (newest / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is not (JSON|a JSON object)"):
        load(newest)


def test_no_checkpoint_there(newest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint step_00000015 in .* of steps 10, 20"):
        load(newest.parent / "step_00000015")
    with pytest.raises(UserError, match="is not a checkpoint: those are folders named like"):
        load(tmp_path)
    assert list_checkpoints(tmp_path / "nowhere") == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot list the checkpoints in .*: Not a directory"):
        list_checkpoints(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user for a moment")
def test_unreadable_folders(newest: Path) -> None:
    newest.parent.chmod(0o700)
    os.seteuid(65534)
    try:
        for read in (verify, load, read_state):
            with pytest.raises(UserError, match="Permission denied"):
                read(newest)
        with pytest.raises(UserError, match="Permission denied"):
            list_checkpoints(newest.parent)
        with pytest.raises(UserError, match=r"cannot write checkpoints to .*Permission denied"):
            Checkpointer(newest.parent, CheckpointConfig())
    finally:
        os.seteuid(0)


# -- nothing is executed ------------------------------------------------------------------------


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def forbid_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was about to be loaded")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (pickle, "_Unpickler"),
        (torch, "load"),
        (torch.serialization, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)


def test_pickles_in_the_folder_are_never_opened(
    newest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb, exploded = pickle.dumps(Bomb(tmp_path / "exploded")), tmp_path / "exploded"
    pickle.loads(bomb)
    assert exploded.exists()  # the bomb works
    exploded.unlink()
    for name in (".metadata", "__0.metadata", "__0_0.distcp", "x.safetensors", "model.pt"):
        (newest / name).write_bytes(bomb)
    forbid_pickle(monkeypatch)
    verify(newest)
    assert read_state(newest) == {"step": 20}
    loaded = load(newest)
    assert all(torch.equal(loaded[name], x) for name, x in TENSORS.items())
    assert not exploded.exists()


@pytest.mark.parametrize("name", [RANK_FILE, "state.json"])
def test_pickles_in_place_of_files_with_forged_checksums(
    newest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    entry = write_file(newest / name, pickle.dumps(Bomb(tmp_path / "exploded")))
    rewrite(newest, lambda e: e["manifest"]["files"].update({name: entry.model_dump()}))
    forbid_pickle(monkeypatch)
    verify(newest)  # the forger's checksums are right
    with pytest.raises(UserError, match="is damaged: "):
        read_state(newest)
        load(newest)
    assert not (tmp_path / "exploded").exists()


# -- all ranks say the same ---------------------------------------------------------------------


def _save(rank: int, folder: Path) -> None:
    with Checkpointer(folder, CheckpointConfig(), dist.new_group()) as checkpointer:
        for step in (1, 2):
            tensors = {f"w{i}": torch.full((10,), float(step)) for i in range(4)}
            checkpointer.save(step, wholes(tensors), {})


def _load(rank: int, path: Path) -> str:
    into = {f"w{i}": torch.zeros(10) for i in range(4)}
    if rank == 1 and path.name.endswith("1"):
        into["w0"] = torch.zeros(11)
    try:
        load_tensors(path, wholes(into), dist.new_group())
    except UserError as error:
        assert not any(x.any() for x in into.values())
        return str(error)
    return ""


def test_all_ranks_raise_the_same(tmp_path: Path) -> None:
    run_ranks(2, _save, tmp_path)
    first, second = list_checkpoints(tmp_path)
    flip(second / "rank_00001.safetensors", -1)
    damaged = run_ranks(2, _load, second)
    assert damaged[0] == damaged[1]
    assert "rank_00001.safetensors does not match its checksum" in damaged[0]
    assert "--step 1" in damaged[0]
    other_shape = run_ranks(2, _load, first)  # rank 1 alone asks for another shape
    assert other_shape[0] == other_shape[1]
    assert "'w0' has shape [10]" in other_shape[0]
    shutil.rmtree(second)
    assert run_ranks(1, _load, first) == [""]
