"""`coterie checkpoint inspect`, `verify`, `diff` and `reshard`, and what they refuse."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.box import Box
from coterie.launch import resharding
from coterie.launch.load_config import load_config
from coterie.launch.main import main
from coterie.launch.placement import boxes_of_rank
from coterie.parallel.checkpoint import CheckpointConfig, Checkpointer, read_manifest, verify
from coterie.parallel.checkpoint_format import checksum
from coterie.parallel.layout import Layout
from coterie.parallel.part import Part
from tests.launch.test_full_disk import small_disk

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Tensors = dict[str, Tensor]
EXPERTS = "model.blocks.1.moe.experts.w_out_EFD"
GAIN = "model.norm.weight"


def tensors(seed: int = 0) -> Tensors:
    """What a run of good.yaml saves."""
    generator = torch.Generator().manual_seed(seed)
    boxes = boxes_of_rank(load_config("good.yaml"), Layout(), 0)
    return {name: torch.randn(box.shape, generator=generator) for name, box in boxes.items()}


def save(run: str, step: int, content: Tensors, **state: Any) -> Path:
    """A run of one process with this checkpoint; the path of that."""
    config = load_config("good.yaml").model_dump(mode="json")
    said = {"config": config, "layout": {"world": 1, "tp": 1}, "step": step, **state}
    with Checkpointer(Path(run, "checkpoints"), CheckpointConfig()) as checkpointer:
        parts = {name: Part.whole(tensor) for name, tensor in content.items()}
        checkpointer.save(step, parts, said)
    Path(run, "config.yaml").write_text(Path("good.yaml").read_text())
    return Path(run, "checkpoints", f"step_{step:08d}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves a copy of the run for the others."""
    return tmp_path_factory.mktemp("saved") / "mine"


@pytest.fixture
def run(place: Path, saved: Path) -> Path:
    """The newest checkpoint, of steps 2 and 4, of the run runs/mine."""
    if not saved.exists():
        save("runs/mine", 2, tensors(2))
        save("runs/mine", 4, tensors())
        shutil.copytree("runs/mine", saved)
    else:
        shutil.copytree(saved, "runs/mine")
    return Path("runs/mine/checkpoints/step_00000004")


class Said:
    """Runs commands; keeps what the last one printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str, code: int = 0) -> str:
        self._capsys.readouterr()
        assert main(["checkpoint", *words]) == code, self._capsys.readouterr().err
        self.out, self.err = self._capsys.readouterr()
        return self.out

    def refuses(self, *words: str) -> str:
        """The sentence that ``words`` end in."""
        self(*words, code=2)
        assert self.out == "" and self.err.startswith("coterie: ") and self.err.count("\n") == 1
        return self.err


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(capsys)


# -- inspect -----------------------------------------------------------------------------------


def test_inspect_shows_every_tensor_and_the_totals(run: Path, said: Said) -> None:
    shown = said("inspect", "runs/mine")
    manifest = read_manifest(run)
    for name, entry in manifest.tensors.items():
        (line,) = [line for line in shown.splitlines() if line.split()[:1] == [name]]
        assert entry.digest in line and entry.dtype in line
    assert f"{run}: step 4" in shown and "saved by 1 process with coterie" in shown
    sizes = dict.fromkeys(("model", "optimizer"), 0)
    for name, tensor in tensors().items():
        sizes[name.split(".")[0]] += tensor.nbytes
    for kind, size in sizes.items():
        assert f"{kind}: {size:,} bytes" in shown
    assert f"sha256 {manifest.files['rank_00000.safetensors'].sha256}" in shown
    assert "equal" not in shown and said.err == ""
    assert "step 2" in said("inspect", "runs/mine", "--step", "2")
    assert "step 2" in said("inspect", "runs/mine/checkpoints/step_00000002")


def test_inspect_as_json(run: Path, said: Said) -> None:
    tree = json.loads(said("inspect", "runs/mine", "--json"))
    manifest = read_manifest(run)
    assert tree["step"] == 4 and tree["world_size"] == 1 and tree["layout"]["world"] == 1
    assert tree["tensors"].keys() == tensors().keys()
    assert tree["tensors"][EXPERTS]["digest"] == manifest.tensors[EXPERTS].digest
    assert tree["tensors"][EXPERTS]["bytes"] == tensors()[EXPERTS].nbytes
    assert tree["files"].keys() == manifest.files.keys() and tree["versions"] == manifest.versions
    assert tree["equal_tensors"] == [] and tree["equal_experts"] == {}


def test_equal_tensors_and_experts_are_told(place: Path, said: Said) -> None:
    content = tensors()
    content[EXPERTS][3] = content[EXPERTS][1]
    content["model.blocks.0.attention_norm.weight"] = content[GAIN].clone()
    moments = f"optimizer.{EXPERTS.removeprefix('model.')}.exp_avg"
    content[moments].zero_()  # equal because nothing came: no error
    save("runs/twins", 1, content)
    warning = f"warning: experts 1 and 3 of {EXPERTS} are equal\n"
    shown = said("inspect", "runs/twins")
    assert f"equal: model.blocks.0.attention_norm.weight, {GAIN}" in shown
    assert said.err == warning
    tree = json.loads(said("inspect", "runs/twins", "--json"))
    assert tree["equal_experts"] == {EXPERTS: [[1, 3]]} and said.err == warning
    assert tree["equal_tensors"] == [["model.blocks.0.attention_norm.weight", GAIN]]
    said("verify", "runs/twins")
    assert said.err == warning


# -- verify ------------------------------------------------------------------------------------


def test_verify_says_what_was_checked(run: Path, said: Said) -> None:
    count, size = len(tensors()), sum(tensor.nbytes for tensor in tensors().values())
    shown = said("verify", "runs/mine")
    assert f"{run}: 2 files" in shown and f"{count} tensors ({size:,} bytes)" in shown


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    envelope = json.loads((path / "manifest.json").read_text())
    change(envelope)
    (path / "manifest.json").write_text(json.dumps(envelope))


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """By someone who makes the manifest's checksum right again."""
    rewrite(path, change)
    rewrite(path, lambda e: e.update(checksum=checksum(e["manifest"])))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


FILE = "rank_00000.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (lambda p: os.truncate(p / FILE, 9000), [FILE, "has 9000 bytes and should have"]),
    "missing": (lambda p: (p / FILE).unlink(), [FILE, "is missing"]),
    "no state": (lambda p: (p / "state.json").unlink(), ["state.json is missing"]),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), ["manifest.json is missing"]),
    "a bit": (lambda p: flip(p / FILE), [f"content of {FILE} does not match its checksum"]),
    "edited by hand": (
        lambda p: rewrite(p, lambda e: e["manifest"].update(world_size=2)),
        ["manifest.json does not match its own checksum"],
    ),
    "a wrong digest": (
        lambda p: forge(p, lambda e: e["manifest"]["tensors"][GAIN].update(digest="1" * 16)),
        [f"the content of tensor '{GAIN}' does not match its digest"],
    ),
    "a hole": (
        lambda p: forge(p, lambda e: e["manifest"]["tensors"][GAIN]["chunks"][0].update(shape=[3])),
        [f"the chunks of tensor '{GAIN}' in manifest.json do not cover it"],
    ),
    "no dtype": (
        lambda p: forge(p, lambda e: e["manifest"]["tensors"][GAIN].update(dtype="float7")),
        [f"tensor '{GAIN}' is of float7"],
    ),
    "another dtype": (
        lambda p: forge(p, lambda e: e["manifest"]["tensors"][GAIN].update(dtype="int32")),
        [f"tensor '{GAIN}' has another dtype in {FILE}"],
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_told_in_a_sentence(run: Path, said: Said, case: str) -> None:
    harm, needles = DAMAGES[case]
    harm(run)
    for words in (["verify", "runs/mine"], ["reshard", "runs/mine", "runs/new", "--world", "1"]):
        sentence = said.refuses(*words)
        assert f"{run} is damaged: " in sentence and "coterie resume runs/mine --step 2" in sentence
        assert all(needle in sentence for needle in needles), sentence
    assert not Path("runs/new").exists() and not list(Path("runs").glob(".*"))
    said("verify", "runs/mine", "--step", "2")


@pytest.mark.parametrize("case", ["truncated", "missing", "no state", "edited by hand"])
def test_inspect_and_diff_of_a_damaged_one(run: Path, said: Said, case: str) -> None:
    DAMAGES[case][0](run)
    other = str(run.with_name("step_00000002"))
    for words in (["inspect", "runs/mine"], ["diff", "runs/mine", other]):
        assert f"{run} is damaged: " in said.refuses(*words)


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "reshard"])
def test_a_checkpoint_of_version_1(run: Path, said: Said, command: str) -> None:
    rewrite(run, lambda e: e.update(version=1))
    words = {"diff": ["runs/mine"], "reshard": ["runs/new", "--world", "1"]}.get(command, [])
    sentence = said.refuses(command, "runs/mine", *words)
    assert "has format version 1, written by an older coterie; this one reads version 2" in sentence


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (["runs/none"], ["runs/none: there is no such run", "runs/mine"]),
        (["runs/done"], ["runs/done/checkpoints holds no checkpoint yet"]),
        (["file"], ["file: is a file, so it is no run"]),
        (["runs/mine", "--step", "3"], ["no checkpoint of step 3; there are: 2, 4"]),
        (["runs/mine/checkpoints/step_00000003"], ["no checkpoint step_00000003", "steps 2, 4"]),
        (["runs/mine/checkpoints/step_00000004", "--step", "2"], ["--step 2", "leave the option"]),
    ],
)
def test_what_is_no_checkpoint(run: Path, said: Said, words: list[str], needles: list[str]) -> None:
    for command, more in (("inspect", []), ("verify", []), ("diff", ["runs/mine"])):
        sentence = said.refuses(command, words[0], *more, *words[1:])
        assert all(needle in sentence for needle in needles), sentence


# -- diff --------------------------------------------------------------------------------------


def test_diff_of_equal_ones(run: Path, said: Said) -> None:
    save("runs/other", 4, tensors())
    other = "runs/other/checkpoints/step_00000004"
    assert said("diff", "runs/mine", "runs/other") == f"{run} and {other} are equal\n"


def test_diff_names_every_difference(run: Path, said: Said) -> None:
    content = tensors()
    content[EXPERTS][2, 1, 3] += 0.5
    content[EXPERTS][3, 0, 0] -= 0.25
    content[GAIN][4] = float("nan")
    content["model.head.weight"][0, 0] = -content["model.head.weight"][0, 0]
    content["optimizer.norm.weight.step"] += 1
    del content["model.embedding.weight"]
    content["model.extra"] = torch.zeros(2)
    content["optimizer.norm.weight.exp_avg"] = torch.zeros(3)
    content["model.blocks.0.attention_norm.weight"] = torch.zeros(16).double()
    save("runs/other", 4, content, sampler={"consumed": 5})
    said("diff", "runs/mine", "runs/other", code=1)
    lines = dict(line.split(": ", 1) for line in said.out.splitlines())
    old, new = tensors()[EXPERTS][2, 1, 3].item(), content[EXPERTS][2, 1, 3].item()
    relative = max(
        float((a - b).abs() / torch.maximum(a.abs(), b.abs()))
        for at in ((2, 1, 3), (3, 0, 0))
        for a, b in [(tensors()[EXPERTS][at].double(), content[EXPERTS][at].double())]
    )
    head = tensors()["model.head.weight"][0, 0].item()
    gain = tensors()[GAIN][4].item()
    count = tensors()["model.head.weight"].numel()
    steps, more_steps = (t["optimizer.norm.weight.step"].item() for t in (tensors(), content))
    assert lines == {
        "sampler": 'null and {"consumed": 5}',
        "model.embedding.weight": f"only in {run}",
        "model.extra": "only in runs/other/checkpoints/step_00000004",
        "optimizer.norm.weight.exp_avg": "shape [16] and [3]",
        "model.blocks.0.attention_norm.weight": "float32 and float64",
        EXPERTS: f"2 of 1,024 elements of experts 2, 3 differ, by 0.5 at most ({relative:.3g} "
        f"relative); first [2, 1, 3]: {old} and {new}",
        GAIN: f"1 of 16 elements differ, by inf at most (inf relative); first [4]: {gain} and nan",
        "model.head.weight": f"1 of {count:,} elements differ, by {2 * abs(head):.3g} at most "
        f"(2 relative); first [0, 0]: {head} and {-head}",
        "optimizer.norm.weight.step": f"{steps} and {more_steps}",
    }


def test_diff_of_config_and_step(run: Path, said: Said) -> None:
    said("diff", "runs/mine", "runs/mine/checkpoints/step_00000002", code=1)
    assert "step: 4 and 2\n" in said.out and "of all 4 experts differ" in said.out


# -- reshard -----------------------------------------------------------------------------------


def test_reshard_there_and_back(run: Path, said: Said) -> None:
    said("reshard", "runs/mine", "runs/four", "--world", "4", "parallel.ep=2", "parallel.tp=2")
    assert "runs/four: step_00000004 for 4 processes, tp 2 · ep 2" in said.out
    four = Path("runs/four/checkpoints/step_00000004")
    verify(four)
    manifest = read_manifest(four)
    assert manifest.world_size == 4 and len(manifest.files) == 5
    assert [chunk.shape for chunk in manifest.tensors[EXPERTS].chunks] == [[2, 16, 16]] * 2
    assert load_config("runs/four/config.yaml").parallel.ep == 2
    said("diff", "runs/mine", "runs/four", code=1)
    assert all(re.match(r"(config\.parallel|layout)\.", line) for line in said.out.splitlines())

    said("reshard", "runs/four", "runs/back", "--world", "1", "parallel.ep=1", "parallel.tp=1")
    back = read_manifest(Path("runs/back/checkpoints/step_00000004"))
    assert back.files[FILE] == read_manifest(run).files[FILE]
    assert back.tensors == read_manifest(run).tensors
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        *("back", "broken", "done", "four", "mine")
    ]


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (["runs/done", "--world", "1"], ["runs/done: exists already"]),
        (["file", "--world", "1"], ["file: exists already"]),
        (["file/new", "--world", "1"], ["cannot write file/new: Not a directory"]),
        (["runs/new", "--world", "3", "parallel.ep=2"], ["parallel: ep 2", "3 ranks"]),
        (
            ["runs/new", "--world", "2", "parallel.epp=2"],
            ["no key parallel.epp", "did you mean 'parallel."],
        ),
        (["runs/new", "--world", "2", "train.steps=5"], ["'train.steps=5'", "only the layout"]),
        (["runs/new", "--world", "0"], ["--world", "greater than or equal to 1"]),
        (["runs/new"], ["--world"]),
    ],
)
def test_reshard_refuses(run: Path, said: Said, words: list[str], needles: list[str]) -> None:
    before = sorted(Path().rglob("*"))
    sentence = said.refuses("reshard", "runs/mine", *words)
    assert all(needle in sentence for needle in needles), sentence
    assert sorted(Path().rglob("*")) == before


def test_reshard_needs_the_config(place: Path, said: Said) -> None:
    save("runs/odd", 1, tensors(), config=None)
    sentence = said.refuses("reshard", "runs/odd", "runs/new", "--world", "1")
    assert "runs/odd/checkpoints/step_00000001/state.json: names no config" in sentence


def test_ctrl_c_leaves_nothing_behind(
    run: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes_of = resharding.boxes_of_rank
    seen = []

    def write_config(config: Any) -> str:
        seen.extend(Path("runs").glob(".new.*/checkpoints/step_*/manifest.json"))
        raise KeyboardInterrupt

    def boxes(*arguments: Any) -> dict[str, Box]:
        raise KeyboardInterrupt

    before = sorted(Path().rglob("*"))
    for name, interrupt in (("boxes_of_rank", boxes), ("dump_config", write_config)):
        monkeypatch.setattr(resharding, name, interrupt)
        said("reshard", "runs/mine", "runs/new", "--world", "2", code=130)
        assert sorted(Path().rglob("*")) == before
        monkeypatch.setattr(resharding, "boxes_of_rank", boxes_of)
    assert len(seen) == 1  # the second came when all but the config was written


def test_a_full_disk_leaves_nothing_behind(run: Path, said: Said) -> None:
    with small_disk(Path("disk").absolute(), "100k") as resize:
        sentence = said.refuses("reshard", "runs/mine", "disk/new", "--world", "1")
        assert "cannot write disk/new: No space left on device" in sentence
        assert list(Path("disk").iterdir()) == []
        resize("4m")
        said("reshard", "runs/mine", "disk/new", "--world", "1")
        verify(Path("disk/new/checkpoints/step_00000004"))
