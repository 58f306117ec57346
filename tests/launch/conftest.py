"""A small config, a dataset, and finished and broken runs to be wrong about."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from coterie.data import write_dataset
from coterie.data.vocabulary import Vocabulary

GOOD = """\
name: tiny
model:
  vocabulary: 277
  width: 16
  layers: 2
  attention: {heads: 2}
  moe:
    experts: {count: 4, hidden: 16}
    router: {k: 2}
data: {path: DATA, sequence: 32}
train:
  steps: 2
  global_batch: 8
optimizer: {warmup: 1}
evaluation: {batch: 8}
"""


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random text in sequences of 32."""
    path = tmp_path_factory.mktemp("dataset") / "data"
    draw = np.random.default_rng(0)
    vocabulary = Vocabulary()
    with write_dataset(path, vocabulary, 32, {"builder": "test"}) as writer:
        for number in range(64):
            text = draw.integers(32, 127, 30).astype(np.uint16)
            split = "held_out" if number % 4 == 0 else "train"
            writer.add(split, np.append(text, np.uint16(vocabulary.eod)))
    return path


@pytest.fixture
def place(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with good.yaml, a run, a run with a damaged checkpoint, and odd files."""
    monkeypatch.chdir(tmp_path)
    good = GOOD.replace("DATA", str(dataset))
    Path("good.yaml").write_text(good)
    Path("file").write_text("not a directory")
    Path("runs/done").mkdir(parents=True)
    Path("runs/done/config.yaml").write_text(good)
    broken = Path("runs/broken/checkpoints/step_00000002")
    broken.mkdir(parents=True)
    Path("runs/broken/config.yaml").write_text(good)
    (broken / "manifest.json").write_text('{"format": "coterie checkpoint", "ver')
    Path("empty").mkdir()
    return tmp_path


@pytest.fixture
def config_with(place: Path) -> Callable[[str, object], Path]:
    """Writes good.yaml again with one dotted key set (or, by ``...``, removed)."""

    def write(key: str, value: object) -> Path:
        tree = yaml.safe_load(Path("good.yaml").read_text())
        group = tree
        *groups, last = key.split(".")
        for name in groups:
            group = group.setdefault(name, {})
        if value is ...:
            del group[last]
        else:
            group[last] = value
        path = Path("edited.yaml")
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write
