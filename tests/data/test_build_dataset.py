"""Building datasets: deterministic, atomic, and clear about bad input."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coterie.core.errors import UserError
from coterie.data import writer as writer_module
from coterie.data.build import Built, build_digits, build_directory, prepare, recipe_key
from coterie.data.config import DataConfig
from coterie.data.digits import split_digits
from coterie.data.documents import interleave
from coterie.data.images import read_image, to_grey
from coterie.data.shards import open_dataset
from coterie.data.vocabulary import Vocabulary

SMALL = DataConfig(documents=60, sequence=160, sources=0.25)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_digits(tmp_path_factory.mktemp("corpus") / "small", SMALL).path


def test_the_build_is_deterministic(corpus: Path, tmp_path: Path) -> None:
    again = build_digits(tmp_path / "again", SMALL)
    assert not again.reused
    assert again.manifest.fingerprint == open_dataset(corpus).fingerprint
    other = build_digits(tmp_path / "other", SMALL.model_copy(update={"seed": 1}))
    assert other.manifest.fingerprint != again.manifest.fingerprint


def test_documents_hold_real_digits_with_their_captions(corpus: Path) -> None:
    dataset = open_dataset(corpus)
    known = {
        (image.tobytes(), int(label))
        for digits in split_digits(SMALL.held_out)[:1]
        for image, label in zip(digits.image_NHW, digits.label_N, strict=True)
    }
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    pieces = [
        p for row in dataset.rows(np.arange(len(dataset))) for p in dataset.vocabulary.decode(row)
    ]
    found = 0
    for before, piece in pairwise(pieces):
        if isinstance(piece, np.ndarray):
            assert isinstance(before, str)
            label = names.index(before.rpartition("a digit ")[2])
            assert (piece.tobytes(), label) in known
            found += 1
    assert found == dataset.counts.documents == 54


def test_held_out_digits_are_not_trained_on(corpus: Path) -> None:
    def images(split: str) -> set[bytes]:
        dataset = open_dataset(corpus, split)
        rows = dataset.rows(np.arange(len(dataset)))
        pieces = [piece for row in rows for piece in dataset.vocabulary.decode(row)]
        return {piece.tobytes() for piece in pieces if isinstance(piece, np.ndarray)}

    train, held = split_digits(SMALL.held_out)
    assert len(images("held_out")) == 6
    assert images("held_out") <= {image.tobytes() for image in held.image_NHW}
    assert images("train") <= {image.tobytes() for image in train.image_NHW}
    assert not images("train") & images("held_out")


def test_documents_begin_with_image_or_text_at_random() -> None:
    vocabulary = Vocabulary()
    image, text = np.array([vocabulary.boi]), np.array([65])
    documents = interleave([image] * 100, [text] * 100, 100, vocabulary, "key")
    firsts = [document[0] for document in documents]
    assert 30 < sum(first == 65 for first in firsts) < 70


def test_about_half_of_the_default_corpus_is_images(tmp_path: Path) -> None:
    dataset = open_dataset(prepare(DataConfig(documents=400), tmp_path))
    assert 0.45 < dataset.image_share < 0.55
    assert dataset.padding < 0.1


def test_the_corpus_is_found_again_by_its_recipe(tmp_path: Path) -> None:
    first = prepare(SMALL, tmp_path)
    stamp = (first / "dataset.json").stat().st_mtime_ns
    assert prepare(SMALL, tmp_path) == first
    assert (first / "dataset.json").stat().st_mtime_ns == stamp
    assert recipe_key(SMALL.model_copy(update={"seed": 1})) != recipe_key(SMALL)
    assert build_digits(first, SMALL).reused


def test_another_recipe_replaces_only_when_told(tmp_path: Path) -> None:
    target = tmp_path / "d"
    old = build_digits(target, SMALL)
    other = SMALL.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="exists and is not empty"):
        build_digits(target, other)
    assert open_dataset(target).fingerprint == old.manifest.fingerprint
    new = build_digits(target, other, replace=True)
    assert open_dataset(target).fingerprint == new.manifest.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_built_dataset_must_agree_on_the_sequence(corpus: Path, tmp_path: Path) -> None:
    assert prepare(DataConfig(path=str(corpus), sequence=160), tmp_path) == corpus
    with pytest.raises(UserError, match=r"160 tokens and data\.sequence is 256"):
        prepare(DataConfig(path=str(corpus), sequence=256), tmp_path)


def test_without_held_out_there_is_no_such_split(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"held_out": 0.0, "sources": 0.0, "documents": 5})
    path = prepare(config, tmp_path)
    assert open_dataset(path).counts.documents == 5
    with pytest.raises(UserError, match="no split 'held_out', only train"):
        open_dataset(path, "held_out")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eight texts and four images in nested folders, a hidden file and one of another kind."""
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    for n in range(8):
        (folder / "deep" / f"text{n}.md").write_text(f"text {n} é\n" * (n + 1))
    for n in range(4):
        grey = np.full((20, 30), n * 85, dtype=np.uint8)
        Image.fromarray(grey).save(folder / f"grey_level-{n}.png")
    (folder / ".hidden.txt").write_text("no")
    (folder / "notes.docx").write_text("no")
    return folder


def _build(source: Path, target: Path, **options: object) -> Built:
    return build_directory(source, target, sequence=100, **options)  # type: ignore[arg-type]


def test_a_directory_becomes_a_dataset(source: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    built = _build(source, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert (built.ignored, built.skipped) == (1, ())
    assert [step[:2] for step in steps] == [(n, 12) for n in range(1, 13)]
    train, held = (open_dataset(built.path, split) for split in ("train", "held_out"))
    assert (train.counts.documents, held.counts.documents) == (11, 1)
    texts, images = [], []
    for dataset in (train, held):
        dataset.verify()
        for row in dataset.rows(np.arange(len(dataset))):
            pieces = dataset.vocabulary.decode(row)
            texts += [p for p in pieces if isinstance(p, str)]
            images += [int(p[0, 0]) for p in pieces if isinstance(p, np.ndarray) and p.ndim == 2]
            assert all((p == p[0, 0]).all() for p in pieces if isinstance(p, np.ndarray))
    assert sorted(images) == [0, 5, 11, 16]
    everything = "".join(texts)
    for n in range(8):
        assert everything.count(f"text {n} é\n") == n + 1
    assert everything.count("grey level 2") == 1
    assert "no" not in everything


def test_many_shards_hold_what_one_would(source: Path, tmp_path: Path) -> None:
    one = open_dataset(_build(source, tmp_path / "one").path)
    many = open_dataset(_build(source, tmp_path / "many", shard_tokens=150).path)
    assert len(many.counts.shards) > 1
    assert many.counts.tokens == one.counts.tokens

    def tokens(d: object) -> list[int]:
        rows = d.rows(np.arange(len(d)))  # type: ignore[attr-defined, arg-type]
        return sorted(rows[rows != one.vocabulary.pad].tolist())

    assert tokens(one) == tokens(many)


def test_images_are_scaled_turned_and_quantised(tmp_path: Path) -> None:
    wide = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(wide.astype(np.uint16)).save(tmp_path / "deep.png")
    deep = read_image(tmp_path / "deep.png", side=8, levels=17)
    np.testing.assert_array_equal(deep, np.rint(np.floor(wide / 257 + 0.5) / 255 * 16))
    Image.new("RGBA", (9, 4), (255, 255, 255, 255)).save(tmp_path / "white.png")
    assert (read_image(tmp_path / "white.png", side=3, levels=5) == 4).all()
    assert to_grey(np.array([[0, 8, 16]]), 17).tolist() == [[0, 128, 255]]


def _bad_text(folder: Path) -> None:
    (folder / "bad.txt").write_bytes(b"fine\xff")


def _bad_image(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"not an image")


def _cut_image(folder: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(
        folder / "bad.png"
    )
    os.truncate(folder / "bad.png", 500)


def _broken_link(folder: Path) -> None:
    (folder / "bad.txt").symlink_to(folder / "nowhere")


BAD_FILES = [
    (_bad_text, r"bad\.txt: is not UTF-8 text \(byte 4 is 0xff\)"),
    (lambda folder: (folder / "bad.rst").write_text(""), r"bad\.rst: is empty"),
    (_bad_image, r"bad\.png: cannot be read as an image"),
    (_cut_image, r"bad\.png: cannot be read as an image"),
    (lambda folder: (folder / "bad.jpg").write_bytes(b""), r"bad\.jpg: cannot be read as an image"),
    (_broken_link, r"bad\.txt: cannot be read: No such file"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD_FILES)
def test_a_bad_file_is_named_and_nothing_is_left(
    source: Path, tmp_path: Path, spoil: object, words: str
) -> None:
    spoil(source)  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        _build(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    built = _build(source, tmp_path / "out", skip_bad=True)
    assert len(built.skipped) == 1
    assert "bad." in built.skipped[0]


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nowhere: there is no such directory"):
        _build(tmp_path / "nowhere", out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: is a file, not a directory"):
        _build(tmp_path / "file", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no text file or image \(accepted: .*\.txt"):
        _build(tmp_path / "empty", out)
    assert not out.exists()


def test_a_failed_replacement_keeps_the_old_dataset(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    old = _build(source, out).manifest.fingerprint
    rename = Path.rename

    def fail_for_the_new(path: Path, target: Path) -> Path:
        if ".building-" in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    (source / "more.txt").write_text("more")
    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(UserError, match="out: cannot be written: Input/output error"):
        _build(source, out, replace=True)
    assert open_dataset(out).fingerprint == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_what_exists_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="is a file"):
        _build(source, tmp_path / "file")
    for replace in (False, True):
        with pytest.raises(UserError, match=r"not empty|no dataset, so it will not be overwritten"):
            _build(source, source, replace=replace)
    assert (source / "grey_level-0.png").exists()
    (tmp_path / "empty").mkdir()
    assert _build(source, tmp_path / "empty").path == tmp_path / "empty"


def test_an_interrupt_leaves_the_old_dataset(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = _build(source, out).manifest.fingerprint

    def interrupt(done: int, total: int, what: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    (source / "more.txt").write_text("more")
    with pytest.raises(KeyboardInterrupt):
        _build(source, out, replace=True, progress=interrupt)
    assert open_dataset(out).fingerprint == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_real_interrupt_leaves_nothing(source: Path, tmp_path: Path) -> None:
    code = f"""
import time
from coterie.data.build import build_directory
def slow(*step):
    print(step, flush=True)
    time.sleep(5)
build_directory({str(source)!r}, {str(tmp_path / "out")!r}, sequence=100, progress=slow)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline()
    assert len(list(tmp_path.iterdir())) == 2  # the hidden directory is being filled
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failing_disk_is_a_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    out = tmp_path / "out"
    old = _build(source, out).manifest.fingerprint

    def fail(file: Path, data: bytes) -> None:
        file.write_bytes(data[:10])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writer_module, "write", fail)
    with pytest.raises(UserError, match=rf"out: cannot be written: {os.strerror(code)}"):
        _build(source, out, replace=True)
    assert open_dataset(out).fingerprint == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


FULL_DISK = """
mount -t tmpfs -o size=64k none {disk} && exec {python} - <<'END'
from pathlib import Path
from coterie.core.errors import UserError
from coterie.data import build_directory
try:
    build_directory({source!r}, "{disk}/out", sequence=100)
except UserError as error:
    print(error)
print(list(Path({disk!r}).iterdir()))
END
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare to mount a small disk")
def test_a_full_disk_is_a_sentence(source: Path, tmp_path: Path) -> None:
    (source / "large.txt").write_text("x" * 100_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = FULL_DISK.format(disk=str(disk), python=sys.executable, source=str(source))
    done = subprocess.run(
        ["unshare", *own, "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=60
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    sentence, left = done.stdout.splitlines()
    assert "out: cannot be written: No space left on device; free some space" in sentence
    assert left == "[]"


def test_two_processes_may_build_the_same_corpus(tmp_path: Path) -> None:
    target = tmp_path / "d"
    others: list[Built] = []

    def overtaken(done: int, total: int, what: str) -> None:
        if done == total:
            others.append(build_digits(target, SMALL))

    built = build_digits(target, SMALL, overtaken)
    assert [other.reused for other in others] == [False]
    assert built.manifest == others[0].manifest
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
