"""MixER's claims, measured: docs/results/mixer.md, with its figures (.json) and picture (.svg).

    python benchmarks/mixer.py [--workers 2] [--only odebench_2] [--write]

MixER against one expert and against a naive mixture (a linear gate trained by gradient), on 2 and
10 families of equations; how often planted families are recovered; what the gate does with narrow
contexts; the same run on 1, 2 and 4 processes. Every finished case is kept in the .json: started
again, it does the missing ones. ``--write`` only writes the page from what is there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import mixer_page
from benchmarks.rows import machine
from coterie.data.environments import generate
from coterie.launch.dynamics_config import DynamicsRunConfig
from coterie.launch.dynamics_training import DynamicsRun, by_family
from coterie.moe.routers.kmeans import KMeansConfig, KMeansRouter, least_squares, routing_accuracy

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results"
ADAPTATION_STEPS = 100
SETTINGS: dict[str, dict[str, Any]] = {
    "odebench_2": {"families": 2, "rounds": 50, "gate_every": 5},
    "odebench_10a": {"families": 10, "rounds": 80, "gate_every": 12},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "MixER": {"kind": "kmeans", "start": "origin"},
    "MixER, spread": {"kind": "kmeans", "start": "spread"},
    "one expert": {"kind": "kmeans"},
    "naive mixture": {"kind": "gradient"},
}


@dataclass(frozen=True)
class Case:
    """One training run."""

    dataset: str
    method: str
    adaptation: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}, {self.method}, {self.adaptation}, seed {self.seed}"

    @property
    def config(self) -> DynamicsRunConfig:
        """The default settings, but a higher rate, for so few rounds, and half the times."""
        settings = SETTINGS[self.dataset]
        families = settings["families"]
        return DynamicsRunConfig.model_validate(
            {
                "data": {"dataset": self.dataset, "times": 10, "test_trajectories": 16}
                | {"seed": self.seed},
                "model": {
                    "experts": 1 if self.method == "one expert" else families,
                    "context": 4 * families,
                    "adaptation": self.adaptation,
                    "method": "rk4",
                    "router": ROUTERS[self.method],
                },
                "train": {
                    "rounds": settings["rounds"],
                    "gate_every": settings["gate_every"],
                    "lr": 3e-3,
                    "seed": self.seed,
                },
            }
        )


def cases(seeds: int, recovery_seeds: int) -> list[Case]:
    """Every case, those of the comparison first."""
    rivals = ("one expert", "naive mixture")
    found = [
        Case("odebench_2", method, "geps", seed)
        for seed in range(seeds)
        for method in ("MixER", *rivals)
    ]
    found += [
        Case("odebench_10a", method, "geps", seed)
        for seed in range(seeds)
        for method in ("MixER, spread", *rivals)
    ]
    found += [
        Case("odebench_2", "MixER", adaptation, seed)
        for adaptation in ("geps", "coda")
        for seed in range(recovery_seeds)
    ]
    found.append(Case("odebench_10a", "MixER", "geps", 0))
    return list(dict.fromkeys(found))


def measure(case: Case) -> dict[str, Any]:
    """Train, test and adapt."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    run = DynamicsRun.build(case.config)
    trainer, family_E = run.trainer, run.data.family_E
    losses, accuracies, reasons = [], [], []
    for _ in range(case.config.train.rounds):
        losses.append(trainer.train_round())
        accuracies.append(routing_accuracy(trainer.environments.expert_E, family_E))
        reasons += [update.reason or "refitted" for update in trainer.round_updates]
    seen, unseen = (generate(case.config.data, "adapt", test=test) for test in (False, True))
    adapted = {}
    for start in ("zero", "centroid"):
        router = trainer.model.router
        if start == "centroid" and not (isinstance(router, KMeansRouter) and router.warm):
            continue
        trainer.config = trainer.config.model_copy(update={"adaptation_start": start})
        found = trainer.adapt(seen, ADAPTATION_STEPS)
        adapted[start] = float(trainer.evaluate(unseen, found.context_E).mean())
    right = [number + 1 for number, accuracy in enumerate(accuracies) if accuracy == 1.0]
    return {
        **asdict(case),
        "train": losses,
        "routing": accuracies,
        "first_right": right[0] if right else None,
        "gate": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "experts": trainer.environments.expert_E.unique().numel(),
        "test": by_family(trainer.evaluate(run.test), run.test),
        "adapted": adapted,
        "contexts": trainer.environments.context_E.tolist(),
        "expert": trainer.environments.expert_E.tolist(),
        "family": family_E.tolist(),
        "seconds": time.perf_counter() - began,
    }


def gate_accuracy(families: int, width: int, seeds: int = 20) -> float:
    """Fraction of environments that a gate fitted to well-separated clusters sends right."""
    found = []
    for seed in range(seeds):
        gen = torch.Generator().manual_seed(seed)
        centre = 3 * torch.randn(families, width, generator=gen, dtype=torch.float64)
        family_E = torch.arange(families).repeat(5)
        context_ED = centre[family_E] + 0.01 * torch.randn(
            len(family_E), width, generator=gen, dtype=torch.float64
        )
        gate = KMeansRouter(width, families, KMeansConfig(narrow_contexts=True)).double()
        gate.weight.copy_(least_squares(context_ED, family_E, families))
        found.append(float((gate.experts_of(context_ED) == family_E).double().mean()))
    return statistics.mean(found)


def layouts() -> list[dict[str, Any]]:
    """The same short run, 4 experts in fp64, over 1, 2 and 4 processes."""
    found: list[dict[str, Any]] = []
    contexts = []
    with tempfile.TemporaryDirectory() as folder:
        for ep in (1, 2, 4):
            run_dir = Path(folder) / str(ep)
            line = [sys.executable, "-m", "coterie.launch", "dynamics", "train", "odebench_2"]
            line += ["model.experts=4", "precision=fp64", "train.rounds=3", "every.evaluate=0"]
            line += ["data.times=10", "train.lr=3e-3"]
            line += [f"parallel.ep={ep}", "--nproc", str(ep), "--run-dir", str(run_dir)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            subprocess.run(line, cwd=ROOT, env=environment, check=True, capture_output=True)
            records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
            values = [r["loss"] if "loss" in r else r["held_out/mean"] for r in records]
            contexts.append(_contexts(run_dir))
            found.append({"ep": ep, "train": values[:-1], "test": values[-1]})
    for entry, context_ED in zip(found, contexts, strict=True):
        entry["contexts_differ_by"] = float((context_ED - contexts[0]).abs().max())
    return found


def _contexts(run_dir: Path) -> torch.Tensor:
    from coterie.launch.dynamics_config import load_dynamics_config
    from coterie.launch.run_checkpoints import CHECKPOINTS
    from coterie.parallel.checkpoint import latest

    run = DynamicsRun.build(load_dynamics_config(run_dir / "dynamics.yaml"))
    checkpoint = latest(run_dir / CHECKPOINTS)
    assert checkpoint is not None
    run.restore(checkpoint)
    return run.trainer.environments.context_E


class Results:
    """The .json, written anew after every case."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"machine": machine(), "cases": [], "settings": SETTINGS}
        if path.exists():
            self.found |= json.loads(path.read_text())

    def has(self, case: Case) -> bool:
        return any(asdict(case).items() <= record.items() for record in self.found["cases"])

    def save(self) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(_rounded(self.found)) + "\n")
        fresh.replace(self.path)


def _rounded(value: Any) -> Any:
    """Floats to six digits: enough, and a fifth of the file; not those that show agreement."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {k: v if k == "layouts" else _rounded(v) for k, v in value.items()}
        case list():
            return [_rounded(v) for v in value]
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3, help="of the comparison")
    parser.add_argument("--recovery-seeds", type=int, default=8, help="of the recovery")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    parser.add_argument("--only", choices=list(SETTINGS), help="only this dataset's cases")
    parser.add_argument("--write", action="store_true", help="only write the page")
    parser.add_argument("--out", type=Path, default=OUT, help="where the three files go")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True, parents=True)
    results = Results(arguments.out / "mixer.json")
    wanted = [] if arguments.write else cases(arguments.seeds, arguments.recovery_seeds)
    missing = [c for c in wanted if not results.has(c) and arguments.only in (None, c.dataset)]
    if "layouts" not in results.found and not arguments.write:
        results.found["layouts"] = layouts()
        warnings.simplefilter("ignore")
        results.found["gate"] = {width: gate_accuracy(10, width) for width in (2, 4, 6, 8, 9, 10)}
        results.save()
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        running = [pool.submit(measure, case) for case in missing]
        for number, done in enumerate(as_completed(running), 1):
            record = done.result()
            results.found["cases"].append(record)
            results.save()
            case = Case(*(record[key] for key in ("dataset", "method", "adaptation", "seed")))
            print(
                f"{number}/{len(missing)} {case.name}: test {record['test']['mean']:.3e}, "
                f"routing {record['routing'][-1]:.2f}, {record['seconds']:.0f} s",
                flush=True,
            )
    mixer_page.write(results.found, arguments.out)
    print(f"wrote {arguments.out / 'mixer.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
