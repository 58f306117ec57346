"""The pages of docs/results say what the figures beside them say."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import mixer_page, overlap_page
from benchmarks.reproductions import moma, smoe_dropout
from tests.docs.blocks import ROOT

RESULTS = ROOT / "docs" / "results"


def figures(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("reproduction", [moma, smoe_dropout])
def test_a_page_is_made_from_its_figures(reproduction: ModuleType, tmp_path: Path) -> None:
    name = reproduction.RUNS.name
    found = figures(name)["found"]
    assert (RESULTS / f"{name}.md").read_text() == reproduction.page(found)
    reproduction.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_mixers_page_is_made_from_its_figures(tmp_path: Path) -> None:
    mixer_page.write(figures("mixer"), tmp_path)
    assert (RESULTS / "mixer.md").read_text() == (tmp_path / "mixer.md").read_text()


def test_overlaps_page_is_made_from_its_figures(tmp_path: Path) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "overlap.json").read_text())
    overlap_page.write(found, tmp_path)
    assert (RESULTS / "overlap.md").read_text() == (tmp_path / "overlap.md").read_text()
    assert (tmp_path / "overlap.png").read_bytes()[:4] == b"\x89PNG"


def test_goals_of_overlap_are_counted() -> None:
    def passes(ms: float, forward: tuple[float, float], both: tuple[float, float]) -> Any:
        shares = dict.fromkeys(("main", "network", "idle", "other", "queued", "waited"), 0.25)
        shares["idle"] = 0.8
        return {
            which: {"ms": ms, "speed_up": speed_up, "hidden": hidden, **shares}
            for which, (speed_up, hidden) in (("forward", forward), ("both", both))
        }

    def case(megabits: int, compute: float, ours: Any) -> dict[str, Any]:
        alone = passes(compute, (0.0, 0.0), (0.0, 0.0))
        rest = passes(100, (0.0, 0.0), (0.0, 0.0))
        return {
            "family": "Mixtral",
            "hosts": 2,
            "megabits": megabits,
            "shape": {"D": 64, "F": 224, "E": 8, "K": 2, "T": 128},
            "contenders": {
                "compute alone": alone,
                "communication alone": rest,
                "plain": passes(250, (1.0, -0.5), (1.0, -0.5)),
                "overlapped 2x2": ours,
            },
            "differs": {"overlapped 2x2": 1e-7},
            "chosen": {"kind": "overlapped", "pieces": 2, "slabs": 4},
            "left_out": {"DeepSpeed": "No module named 'deepspeed'"},
            "rounds": 7,
            "seconds": 60.0,
        }

    cases = [
        case(200, 100.0, passes(130, (1.6, 0.7), (1.4, 0.85))),
        case(500, 500.0, passes(400, (2.5, 0.9), (0.9, -0.1))),  # compute and way are not equal
    ]
    machine = {"cpu": "a processor", "torch": "2.13"}
    page = overlap_page.page({"machine": machine, "results": dict(enumerate(cases))})
    assert "| overlapped 2x2 | 2 | 1 of 2 | 1 of 2 | 2 of 2 | 1 of 4 |" in page
    assert "| 2.50 / 0.90 | 2x4 |" in page
    assert "| Mixtral, 2 hosts, 200 | 80% / 80% | -50% / -50% | 70% / 85% |" in page
    mean = (1.6 * 2.5) ** 0.5
    assert f"| overlapped 2x2, forward | 2 hosts, CPU | {mean:.2f} (1.60–2.50) | 80% |" in page
    assert "| Mixtral, 2 hosts, 200 | 100 / 100 | 100 / 100 | 200 / 200 | 250 / 250 |" in page
    assert "Mixtral, 2 hosts, 500 (83%, forward)" in page
    assert "Left out: DeepSpeed: No module named 'deepspeed'." in page


def test_claims_of_smoe_dropout_are_counted() -> None:
    falls = dict(zip(map(str, smoe_dropout.NUMBERS), (6.0, 5.0, 4.0, 3.0, 2.0, 1.0), strict=True))
    stays = falls | {"16": 2.0}  # as with 12
    random, learned, dense = smoe_dropout.METHODS
    page = smoe_dropout.page({random: [falls, stays], learned: [stays, falls], dense: [{"": 1.0}]})
    assert "falls with every step of k in 1 of 2 seeds" in page
    assert "worse with 16 experts than with\n8 in 0 of 2 seeds, and best with k 12 or 16" in page


def test_claims_of_moma_are_counted() -> None:
    def run(image: float, text: float, curve: list[float]) -> dict[str, Any]:
        return {
            "curve": curve,
            "metrics": {
                **{f"{prefix}loss/{name}": loss for prefix in ("", "non_causal/")
                   for name, loss in (("image", image), ("text", text))},
                "auxiliary/agreement": 0.96,
                "auxiliary/always_no": 0.875,
            },
        }  # fmt: skip

    # of nine reports the last five are smoothed to 3; the fast one has it after six
    slow, fast = [9.0 - i for i in range(9)], [9.0 - 2 * i for i in range(9)]
    found = {
        "dense": [run(2.0, 1.0, slow)],
        "1t1i": [run(2.5, 1.0, [9.0] * 9)],
        "8x": [run(1.8, 0.8, slow)],
        "4t4i": [run(1.5, 0.9, fast)],
        "8x, no noise": [run(1.4, 0.9, fast)],
        "4t4i, no noise": [run(1.5, 0.8, slow)],
    }
    etas = [moma.etas(found, method) for method in found]
    assert etas == [[1.0], [None], [1.0], [9 / 6], [9 / 6], [1.0]]
    page = moma.page(found)
    for claim, times in {
        "1t1i is better than dense on images": 0,
        "4t4i: better than 8x on images (causal)": 1,
        "4t4i: worse than 8x on text (causal)": 1,
        "4t4i: better than dense on images (causal)": 1,
        "4t4i: trains faster than dense (η > 1; theirs 3.7)": 1,
        "8x: trains faster than dense (η > 1; theirs 3.0)": 0,
        "4t4i, no noise: better than 8x on images (causal)": 0,
        "4t4i, no noise: worse than 8x on text (causal)": 0,
        "8x, no noise: trains faster than dense (η > 1; theirs 3.0)": 1,
    }.items():
        assert f"| {claim} | {times} of 1 |" in page
