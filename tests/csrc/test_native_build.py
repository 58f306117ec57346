"""Compiling the native libraries: what is skipped is said in one line, and nothing else stops."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from coterie.csrc import build

SOURCE = Path(build.__file__).parent


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "COTERIE_SKIP_NATIVE", "COTERIE_SKIP_CUDA", "COTERIE_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)


def build_skipping(target: Path, capfd: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    """Build where both libraries must be skipped; returns the report and what was printed."""
    for device in build.LIBRARIES:
        (target / build.library_name(device)).write_bytes(b"of an earlier build")
    report = build.build(SOURCE, target)
    assert json.loads((target / build.REPORT).read_text()) == report
    assert sorted(p.name for p in target.iterdir()) == [build.REPORT]  # no old library, no litter
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1 and printed.endswith("plain PyTorch is used instead\n")
    return report, printed


def test_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    report, line = build_skipping(tmp_path, capfd)
    assert "CPU" in line and "no C++ compiler (g++, c++ or clang++)" in line
    assert "apt-get install g++ && python -m coterie.csrc.build" in line
    assert [entry["built"] for entry in report["libraries"].values()] == [False, False]


def test_when_told_to_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COTERIE_SKIP_NATIVE", "1")
    _, line = build_skipping(tmp_path, capfd)
    assert line.startswith("coterie: CPU and CUDA ops skipped: COTERIE_SKIP_NATIVE=1 (to build: ")


def test_when_the_compiler_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'rows.cpp:1: error: too tired' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("COTERIE_SKIP_CUDA", "1")
    target = tmp_path / "target"
    target.mkdir()
    report, line = build_skipping(target, capfd)
    assert f"CPU ops skipped: {compiler} failed: rows.cpp:1: error: too tired" in line
    assert "too tired" in report["libraries"]["cpu"]["log"]


def test_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")  # finds nothing
    python.chmod(0o755)
    monkeypatch.setattr(build.sys, "executable", str(python))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    target = tmp_path / "target"
    target.mkdir()
    _, line = build_skipping(target, capfd)
    assert "CPU and CUDA ops skipped: torch is not installed yet (to build: pip install" in line


def test_an_old_torch_is_refused() -> None:
    with pytest.raises(build.Skipped, match=r"torch 2\.10\.1\+cu128 is older than 2\.11"):
        build._checked(build.Torch("/torch", "2.10.1+cu128"))
    assert build._checked(build.Torch("/torch", "2.11.0")).version == "2.11.0"


def test_cuda_compiles_without_a_gpu_and_spills_nothing(tmp_path: Path) -> None:
    try:
        command = build.cuda_command(SOURCE, tmp_path / "_cuda.so", build.find_torch())
    except build.Skipped as skip:
        pytest.skip(skip.reason)
    done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", text
    )
    assert len(usage) == 24  # 3 kernels, 4 dtypes, packs of 16 bytes or of one number
    assert set(usage) == {("0", "0", "0")}, "a kernel uses local memory or spills registers"

    # without libtorch.so, which brings libtorch_cuda, the weak symbol for the stream stays null
    if shutil.which("readelf"):
        needed = subprocess.run(
            ["readelf", "-d", str(tmp_path / "_cuda.so")], capture_output=True, text=True
        )
        assert "[libtorch.so]" in needed.stdout
