"""Which ops run native, which fall back, and that the reason is known."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.csrc import build, loader, twins

ROOT = Path(build.__file__).parents[1]
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")
SCRIPT = """
import json, torch
from coterie.csrc import invert, loader, permute, unpermute
g = torch.Generator().manual_seed(5)
token_A = torch.randint(9, (30,), generator=g)
x_TD = torch.randn(9, 33, generator=g, dtype=torch.float64).requires_grad_()
weight_A = torch.randn(30, generator=g, dtype=torch.float64).requires_grad_()
inverse = invert(token_A, 9)
y_TD = unpermute(permute(x_TD, token_A, inverse).sin(), weight_A, token_A, inverse)
y_TD.square().sum().backward()
sums = [t.detach().square().sum().item() for t in (y_TD, x_TD.grad, weight_A.grad)]
cpu = [r for r in loader.status() if r.device == "cpu"]
print(json.dumps({"sums": sums, "native": [r.native for r in cpu], "reason": cpu[0].reason}))
"""


def run(folder: Path, **environment: str) -> tuple[dict, str]:
    """The script's answer in a new process started in ``folder``, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of csrc that can be damaged, importable from its root."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "coterie.py", tmp_path)
    return tmp_path


needs_native = pytest.mark.skipif(
    not loader.status()[0].native, reason=f"native ops: {loader.status()[0].reason}"
)


def test_told_to_use_twins() -> None:
    told, errors = run(ROOT, COTERIE_NATIVE="0")
    assert (told["reason"], any(told["native"]), errors) == ("COTERIE_NATIVE=0", False, "")
    as_is, _ = run(ROOT)
    assert told["sums"] == pytest.approx(as_is["sums"], rel=1e-13)


@needs_native
def test_a_damaged_library_is_not_used_and_is_reported(checkout: Path) -> None:
    (checkout / "csrc" / build.library_name("cpu")).write_bytes(b"not a library")
    answer, errors = run(checkout)
    assert answer["reason"].startswith("loading failed: ") and not any(answer["native"])
    assert errors.startswith("coterie: plain PyTorch runs in place of native ops (CPU: loading ")
    assert errors.count("\n") == 1


@pytest.fixture
def folder(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same copy, looked at by the loader of this process."""
    monkeypatch.setattr(loader, "_HERE", checkout / "csrc")
    monkeypatch.delenv("COTERIE_NATIVE", raising=False)
    return checkout / "csrc"


def test_never_built(folder: Path) -> None:
    (folder / build.REPORT).unlink(missing_ok=True)
    assert loader._missing("cpu") == ("not built", loader.REBUILD)


@needs_native
def test_built_and_whole(folder: Path) -> None:
    assert loader._missing("cpu") == ("", "")


@needs_native
@pytest.mark.parametrize(
    "name", ["build.py", *(path.name for path in ROOT.glob("csrc/*") if path.suffix in SUFFIXES)]
)
def test_sources_newer_than_the_libraries(folder: Path, name: str) -> None:
    cuda = loader._missing("cuda")
    with (folder / name).open("a") as source:
        source.write("// changed\n")
    stale = ("older than its sources", loader.REBUILD)
    assert loader._missing("cpu") == (stale if name.endswith((".py", ".cpp", ".h")) else ("", ""))
    if cuda == ("", ""):
        assert loader._missing("cuda") == (cuda if name.endswith(".cpp") else stale)


def test_a_report_of_an_earlier_form_is_out_of_date(folder: Path) -> None:
    report = {"sources": build.source_hash(folder, "cpu"), "libraries": {"cpu": {"built": True}}}
    (folder / build.REPORT).write_text(json.dumps(report))
    assert loader._missing("cpu") == ("older than its sources", loader.REBUILD)
    assert loader._missing("fused") == ("not built", loader.REBUILD)


@pytest.mark.parametrize(
    ("rank", "gpu", "devices"),
    [(None, False, "CPU"), ("0", True, "CPU and CUDA and FUSED"), ("1", True, "")],
)
def test_one_line_tells_of_stale_libraries(
    rank: str | None,
    gpu: bool,
    devices: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = {"built": True, "sources": "of old"}
    report = {"libraries": dict.fromkeys(build.LIBRARIES, old)}
    (folder / build.REPORT).write_text(json.dumps(report))
    monkeypatch.setattr(loader.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    missing = loader._load.__wrapped__()
    assert {reason for reason, _ in missing.values()} == {"older than its sources"}
    expected = (
        f"coterie: plain PyTorch runs in place of native ops ({devices}: older than its sources); "
        f"rebuild them: {sys.executable} -m coterie.csrc.build\n"
    )
    assert capsys.readouterr().err == (expected if devices else "")


@needs_native
def test_a_lost_library(folder: Path) -> None:
    (folder / build.library_name("cpu")).unlink()
    assert loader._missing("cpu") == ("the library file is gone", loader.REBUILD)


@needs_native
def test_the_reason_of_the_build_is_kept(folder: Path) -> None:
    report = json.loads((folder / build.REPORT).read_text())
    report["libraries"]["cpu"] = {"built": False, "reason": "no C++ compiler", "fix": "do this"}
    (folder / build.REPORT).write_text(json.dumps(report))
    assert loader._missing("cpu") == ("no C++ compiler", "do this")


@pytest.mark.parametrize(
    ("why", "gpu", "reason"),
    [
        (("no CUTLASS headers", "do this"), (9, 0), "no CUTLASS headers"),
        (("", ""), None, "compiled, but torch sees no CUDA device"),
        (("", ""), (10, 0), "for Hopper GPUs (sm_90), but this GPU is sm_100"),
        (("", ""), (8, 9), "for Hopper GPUs (sm_90), but this GPU is sm_89"),
        (("", ""), (9, 0), ""),
    ],
)
def test_where_the_fused_kernels_run(
    why: tuple[str, str],
    gpu: tuple[int, int] | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "_load", lambda: {"fused": why})
    monkeypatch.setattr(loader.torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(loader.torch.cuda, "get_device_capability", lambda: gpu)
    assert loader.fused_missing() == (reason, why[1])


def test_the_library_that_defines_the_ops_comes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"cpu": ("not built", loader.REBUILD)}
    monkeypatch.setattr(loader, "_missing", lambda library: found.get(library, ("", "")))
    missing = loader._load.__wrapped__()
    assert missing["cuda"] == missing["fused"]
    assert missing["fused"][0] == "the CPU library, which defines the ops, is missing"


def test_an_op_without_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of device type "cuda" and in the library "fused"; elsewhere it says why not."""
    monkeypatch.setitem(loader._NATIVE, "fused", ("permute_fused",))
    monkeypatch.setattr(loader, "_CHOSEN", {})
    absence = {"fused": ("no nvcc", "find it"), "cpu": ("", "")}
    monkeypatch.setattr(loader, "_absence", absence.__getitem__)
    with pytest.raises(RuntimeError, match=r"permute_fused cannot .* no nvcc \(.*: find it\)$"):
        loader.kernel("permute_fused", "cuda")
    with pytest.raises(RuntimeError, match=r"permute_fused cannot run on cpu, .*: not compiled$"):
        loader.kernel("permute_fused", "cpu")
    absence["fused"] = ("", "")
    with pytest.raises(AttributeError, match="permute_fused"):  # torch is asked, and has none
        loader.kernel("permute_fused", "cuda")


def test_twins_only_inside_the_block() -> None:
    before = loader.kernel("permute", "cpu")
    with loader.twins_only():
        assert loader.kernel("permute", "cpu") is twins.permute_reference
        assert loader.kernel("unpermute", "cuda") is twins.unpermute_reference
    assert loader.kernel("permute", "cpu") is before


def test_status_names_every_op_on_both_devices() -> None:
    rows = ("permute", "unpermute", "unpermute_backward", "invert")
    ops = (*rows, "sort_by_expert", "gate", "gate_backward", "swiglu", "swiglu_backward")
    assert [(r.device, r.op) for r in loader.status()] == [
        (device, op) for device in ("cpu", "cuda") for op in ops
    ]
    assert all(r.native or r.reason for r in loader.status())


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["80"], (8, 6), True),
        (["86"], (8, 0), False),
        (["80"], (9, 0), False),
        (["80", "120f"], (12, 0), True),
    ],
)
def test_a_gpu_that_the_code_was_not_compiled_for(
    archs: list[str], capability: tuple[int, int], runs: bool
) -> None:
    reason, fix = loader._gpu_mismatch(archs, capability)
    assert bool(reason) != runs
    if not runs:
        gpu = f"{capability[0]}{capability[1]}"
        assert f"this GPU is sm_{gpu}" in reason
        assert fix == f"COTERIE_CUDA_ARCHS={','.join([*archs, gpu])} {loader.REBUILD}"
