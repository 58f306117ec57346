"""What the documentation shows works: commands, code, links, and the generated reference."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
import yaml

from coterie.launch.config import RunConfig
from tests.distributed import run_ranks
from tests.docs import commands
from tests.docs.blocks import ROOT, blocks, pages, prose
from tests.docs.commands import DocumentationError

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:html5lib's sanitizer"
)

SHOWN = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/checkpoints.md",
    "docs/mixer.md",
    "docs/mixture_of_depths.md",
    "docs/moma.md",
    "docs/parallelism.md",
    "docs/plan.md",
    "docs/quickstart.md",
    "docs/smoe_dropout.md",
    "docs/telemetry.md",
    "docs/upcycling.md",
)
RANKS = 2
TORCHRUN = f"# torchrun --standalone --nproc-per-node {RANKS}\n"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(
    r"`((?:core|csrc|comm|moe|models|data|parallel|launch|configs|docs|tests)/[^`\s]*)`"
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", SHOWN)
def test_commands_work(place: Path, page: str) -> None:
    for number, line in commands.lines((ROOT / page).read_text()):
        try:
            commands.run(line)
        except (DocumentationError, KeyError, ValueError) as error:
            pytest.fail(f"{page}:{number}: {line}\n{error}")


def test_every_page_with_commands_is_run() -> None:
    with_commands = {named(page) for page in pages() if blocks(page.read_text(), "sh")}
    assert with_commands == set(SHOWN)


def test_blocks_are_of_known_languages() -> None:
    for page in pages():
        text = page.read_text()
        fences = len(re.findall(r"^```", text, re.MULTILINE))
        known = [b for kind in ("sh", "python", "yaml", "text") for b in blocks(text, kind)]
        assert fences == 2 * len(known), (
            f"{named(page)}: a block is neither sh, python, yaml nor text"
        )


def test_settings_are_accepted() -> None:
    """Each block of YAML, laid over the quick start's config."""
    found = [(page, b) for page in pages() for b in blocks(page.read_text(), "yaml")]
    assert found
    for page, block in found:
        tree = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
        try:
            RunConfig.model_validate(_merged(tree, yaml.safe_load(block.text)))
        except ValueError as error:
            pytest.fail(f"{named(page)}:{block.line}: {error}")


def _merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        known = isinstance(value, dict) and isinstance(tree.get(key), dict)
        known = known and "kind" not in value  # which has other settings
        tree[key] = _merged(tree[key], value) if known else value
    return tree


@pytest.mark.parametrize(
    "line",
    [
        "rm -rf runs",
        "coterie trian quickstart",
        "coterie train quickstart model.widht=3",
        "coterie train quickstart --nproc 3",
        "coterie resume runs/none",
        "coterie config show mixtral_8x7b --nproc 63",
        "make nothing",
        "source venv/bin/activate",
        "torchrun --no-such-option -m coterie.launch train quickstart",
        "torchrun --nproc-per-node 3 -m coterie.launch train quickstart",
        "srun --nodes 8 --ntasks-per-node 7 coterie train mixtral_8x7b",
        "tensorboard --logdir runs",
        "python docs/write_nothing.py",
    ],
)
def test_a_wrong_command_is_noticed(place: Path, line: str) -> None:
    with pytest.raises((DocumentationError, SystemExit, FileNotFoundError)):
        commands.run(line)


def python_pages() -> list[str]:
    return [named(page) for page in pages() if blocks(page.read_text(), "python")]


@pytest.mark.parametrize("page", python_pages())
def test_code_runs(place: Path, page: str) -> None:
    found = blocks((ROOT / page).read_text(), "python")
    if any("runs/quickstart" in block.text for block in found):
        commands.run("coterie train quickstart 'evaluation.prompts=[]'")
    namespace: dict[str, object] = {"__name__": page}
    for block in found:
        source = "\n" * (block.line - 1) + block.text  # errors name the page's line
        if block.text.startswith(TORCHRUN):
            run_ranks(RANKS, run_on_rank, source, str(ROOT / page))
        else:
            exec(compile(source, str(ROOT / page), "exec"), namespace)


def run_on_rank(rank: int, source: str, page: str) -> None:
    """The block as torchrun would run it, in a process that has joined the group already."""
    with patch.object(dist, "init_process_group"), patch.object(dist, "destroy_process_group"):
        exec(compile(source, page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", pages(), ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page.read_text())
    for link in _LINK.findall(re.sub(r"`[^`]*`", "", text)):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(ROOT), f"{link} leads nowhere"
        assert not heading or heading in headings(target), f"{link}: there is no such heading"
    for path in _PATH.findall(text):
        assert (ROOT / path).exists(), f"{path} does not exist"


def headings(page: Path) -> list[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_reference_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import write_reference  # type: ignore[import-not-found]

    wanted = write_reference.reference()
    assert write_reference.FILE.read_text() == wanted, "run: python docs/write_reference.py"
    of_dynamics = write_reference.dynamics_reference()
    assert write_reference.DYNAMICS_FILE.read_text() == of_dynamics, "the same command"
    assert "| `train.rounds` | a whole number ≥ 1 | `200` |" in of_dynamics
    assert "| `train.steps` | a whole number ≥ 1 | **required** |" in wanted


def test_the_license_is_apaches() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0" in text
    assert "Copyright 2026 the coterie authors" in text
