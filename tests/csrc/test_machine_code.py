"""What nvcc made of the kernels: no spills, no local memory, and the instructions of Hopper.

The libraries of this checkout are looked at as they were built; where a tool that is needed to
build one is missing, its checks are skipped, and where none is, it must be there.
"""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from built_code import SOURCE, machine_code, report

from coterie.csrc import build

OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
GB = 10**9


@pytest.mark.parametrize("library", ["cuda", "fused"])
def test_nothing_is_spilled(library: str) -> None:
    for name, figures in report(library).items():
        assert figures["kernels"] > 0, name
        assert figures["spills"] == 0, name
        if library == "cuda":
            assert figures["stack"] == 0, name


def test_registers_add_up_when_they_change_hands() -> None:
    """128 threads keep 40, 256 take 232: of as many as a kernel begins with."""
    for name, figures in report("fused").items():
        assert 384 * figures["registers"] == 128 * 40 + 256 * 232, name


def test_no_product_of_the_tensor_cores_waits_in_line() -> None:
    for name, figures in report("fused").items():
        for warning in figures["warnings"]:
            assert not re.search(r"C7508|C7510|serialized", warning), (name, warning)


@pytest.mark.parametrize("library", build.LIBRARIES)
def test_memory_to_compile_with(library: str) -> None:
    for name, figures in report(library).items():
        assert figures["memory"] < 4 * GB, name


@cache
def instructions(library: str) -> dict[str, dict[str, set[str]]]:
    """Those of each kernel, for each .cu file of a library."""
    return opcodes(machine_code(library))


def opcodes(text: str) -> dict[str, dict[str, set[str]]]:
    """What cuobjdump printed, as the names of instructions by file and kernel."""
    files: dict[str, dict[str, set[str]]] = {}
    kernels: dict[str, set[str]] = {}
    names: set[str] = set()
    for line in text.splitlines():
        if line.startswith("identifier = "):
            kernels = files.setdefault(Path(line.partition("= ")[2].strip()).name, {})
        elif "Function : " in line:
            names = kernels.setdefault(line.partition("Function : ")[2].strip(), set())
        elif found := OPCODE.match(line):
            names.add(found[1])
    return files


def test_instructions_are_read() -> None:
    text = (
        "identifier = /csrc/rows.cu \n\t\tFunction : _Z4rowsv\n"
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;  /* 0x00000a00ff017b82 */\n"
        "                                                           /* 0x000ff00000000800 */\n"
        "        /*12c0*/              @!P0 LDL.64 R2, [R1] ;       /* 0x0000000000027983 */\n"
        "        /*12d0*/             @UP1 UTMALDG.2D [UR8], [UR4] ;  /* 0x00000000040075b4 */\n"
    )
    assert opcodes(text) == {"rows.cu": {"_Z4rowsv": {"LDC", "LDL", "UTMALDG"}}}


def test_light_kernels_use_no_local_memory() -> None:
    files = instructions("cuda")
    assert sorted(files) == sorted(report("cuda"))
    for name, kernels in files.items():
        for kernel, used in kernels.items():
            assert "EXIT" in used and not used & {"LDL", "STL"}, (name, kernel)


def test_fused_kernels_use_what_hopper_has() -> None:
    """Tensor-core products of warp groups, loads by the TMA unit, registers moved between them."""
    files = instructions("fused")
    assert sorted(files) == sorted(report("fused"))
    for name, kernels in files.items():
        products = {kernel: used for kernel, used in kernels.items() if "HGMMA" in used}
        assert products, f"{name} has no kernel with HGMMA"
        for kernel, used in products.items():
            assert {"UTMALDG", "USETMAXREG"} <= used, (name, kernel)


@pytest.mark.parametrize("library", ["cuda", "fused"])
def test_the_library_that_finds_the_stream_is_needed(library: str) -> None:
    """Without libtorch.so, which brings libtorch_cuda, the stream's weak symbol stays null."""
    report(library)
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    command = ["readelf", "-d", str(SOURCE / build.library_name(library))]
    assert "[libtorch.so]" in subprocess.run(command, capture_output=True, text=True).stdout
