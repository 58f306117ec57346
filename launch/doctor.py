"""``coterie doctor``: what runs here, what falls back and why, and what would fix it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from coterie.launch.processes import cores

State = Literal["ok", "gap", "broken"]

_OLDEST_TORCH = (2, 11)
_COMPULSORY = (
    *("numpy", "scipy", "pydantic", "PyYAML", "typer", "rich", "tensorboard"),
    *("safetensors", "scikit-learn", "matplotlib", "pillow", "psutil"),
)
_OPTIONAL = {
    "megatron-core": "pip install megatron-core",
    "deepspeed": "pip install deepspeed",
    "transformers": "pip install transformers",
    "nvidia-cutlass": "pip install --no-deps nvidia-cutlass",
    "py-spy": "pip install py-spy",
}
_BIG_DISK, _BIG_SHM = 10e9, 1e9
_MARKS = {"ok": "[green]ok[/]", "gap": "[yellow]gap[/]", "broken": "[red]broken[/]"}


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    topic: str
    state: State
    """``gap``: it works, but less well or not everything; ``broken``: coterie cannot run."""
    detail: str
    fix: str = ""
    """The one command that would change it."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example:  coterie doctor")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Show what this machine offers: torch, devices, native code, packages; and how to fix gaps.

    The exit code is 0 unless something that coterie cannot do without is broken.
    """
    findings = list(examine())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False))
    else:
        _print_table(findings)
    return int(any(finding.state == "broken" for finding in findings))


def examine() -> Iterator[Finding]:
    """All findings, in the order of the table."""
    yield _python()
    yield from _compulsory()
    torch_found = _torch()
    yield torch_found
    if torch_found.state != "broken":
        yield from _backends()
        yield from _devices()
        yield _cpu()
        yield from _native_ops()
    yield _nvcc()
    for name, fix in _OPTIONAL.items():
        yield _optional(name, fix)
    yield _apex()
    yield from _space()


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "", ""):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(finding.topic, _MARKS[finding.state], escape(finding.detail))
    console = Console()
    console.print(table)
    fixes = {finding.fix: finding.topic for finding in reversed(findings) if finding.fix}
    if fixes:
        console.print("\nTo close the gaps:")
        for fix, topic in reversed(fixes.items()):
            console.print(f"  {topic}: {fix}", markup=False, highlight=False, soft_wrap=True)


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compulsory() -> Iterator[Finding]:
    missing = [name for name in _COMPULSORY if _version(name) is None]
    if missing:
        names = " ".join(missing)
        yield Finding("packages", "broken", f"missing: {names}", f"pip install {names}")
        return
    versions = ", ".join(f"{name} {_version(name)}" for name in _COMPULSORY)
    yield Finding("packages", "ok", versions)


def _torch() -> Finding:
    oldest = ".".join(map(str, _OLDEST_TORCH))
    install = f"pip install 'torch>={oldest}'"
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        return Finding("torch", "broken", f"cannot be imported: {reason}", install)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    detail = f"{torch.__version__} ({build})"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        return Finding("torch", "broken", f"{detail}; needs {oldest}", install)
    return Finding("torch", "ok", detail)


def _backends() -> Iterator[Finding]:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        yield Finding("gloo", "broken", "this torch has no gloo", "pip install --upgrade torch")
    else:
        yield Finding("gloo", "ok", "collectives between CPUs")
    if dist.is_nccl_available():
        yield Finding("nccl", "ok", "collectives between GPUs")
    else:
        yield Finding("nccl", "gap", "not in this build of torch: no training on several GPUs")


def _devices() -> Iterator[Finding]:
    import torch

    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        detail = (
            f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
        )
        yield Finding(f"cuda:{number}", "ok", detail)
    if torch.cuda.is_available():
        return
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        index = "https://download.pytorch.org/whl/cu130"
        fix = f"pip install --force-reinstall torch --index-url {index}"
        yield Finding("CUDA", "gap", "this machine has a driver, but torch is for CPUs", fix)
    else:
        yield Finding("CUDA", "gap", "no device: training runs on the CPU")


def _cpu() -> Finding:
    import torch

    flags = _cpu_flags()
    features = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX512-BF16": "avx512_bf16"}
    features["AMX-BF16"] = "amx_bf16"
    has = [name for name, flag in features.items() if flag in flags]
    threads = f"{torch.get_num_threads()} threads of {cores()} cores"
    detail = f"{threads}, {', '.join(has) or platform.machine()}"
    if not {"avx512_bf16", "amx_bf16"} & flags and platform.machine() == "x86_64":
        detail += "; bf16 is emulated, and very slow"
    return Finding("CPU", "ok", detail)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next(
        (set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )


def _native_ops() -> Iterator[Finding]:
    import warnings

    from coterie.comm.nccl import SPARED
    from coterie.csrc.loader import fused_missing, status

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say stands in the table
        records = status()
    for device in dict.fromkeys(record.device for record in records):
        here = [record for record in records if record.device == device]
        native = [record.op for record in here if record.native]
        if native:
            yield Finding(f"ops on {device}", "ok", f"native: {', '.join(native)}")
        for reason in dict.fromkeys(record.reason for record in here if not record.native):
            lacking = [record for record in here if record.reason == reason]
            names, fix = ", ".join(record.op for record in lacking), lacking[0].fix
            state: State = "gap" if fix else "ok"
            yield Finding(f"ops on {device}", state, f"plain PyTorch: {names} ({reason})", fix)
    reason, fix = fused_missing()
    if reason:
        yield Finding("fused kernels", "gap", f"not used: {reason}", fix)
    else:
        detail = f"loaded; they leave {SPARED} multiprocessors to NCCL"
        yield Finding("fused kernels", "ok", detail)


def _nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        return Finding("nvcc", "gap", "not found: CUDA ops cannot be compiled here")
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = next((line for line in answer.stdout.splitlines() if "release" in line), "")
    return Finding("nvcc", "ok", f"{release.rpartition('release ')[2] or 'unknown'} at {nvcc}")


def _optional(name: str, fix: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "gap", "not installed (optional)", fix)
    return Finding(name, "ok", version)


def _apex() -> Finding:
    """NVIDIA's Apex has no release on PyPI; what is called apex there is a web toolkit."""
    version = _version("apex")
    if version is None:
        return Finding("apex", "ok", "not installed; torch's fused AdamW and RMSNorm are used")
    if importlib.util.find_spec("apex.optimizers") is None:
        detail = f"{version} is PyPI's unrelated package of that name, not NVIDIA's; not used"
        return Finding("apex", "gap", detail, "pip uninstall apex")
    return Finding("apex", "ok", f"{version}, NVIDIA's")


def _space() -> Iterator[Finding]:
    here = shutil.disk_usage(Path.cwd())
    fix = "choose a larger disk: coterie train … --run-dir DIR"
    detail = f"{here.free / 1e9:.0f} GB free in {Path.cwd()}"
    small = here.free < _BIG_DISK
    yield Finding("disk", "gap" if small else "ok", detail, fix if small else "")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return
    free = shutil.disk_usage(shared).free
    fix = "mount -o remount,size=8G /dev/shm   (docker run --shm-size=8g)"
    small = free < _BIG_SHM
    detail = f"{free / 1e9:.1f} GB free in {shared}"
    yield Finding("shared memory", "gap" if small else "ok", detail, fix if small else "")
