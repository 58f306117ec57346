"""Do the certificates of a run agree with each other, with its checkpoints, with another run's?"""

from pathlib import Path

from coterie.launch.run_checkpoints import CHECKPOINTS
from coterie.parallel.certificate import Certificate, hash_of_tensors
from coterie.parallel.checkpoint import list_checkpoints, read_manifest
from coterie.parallel.checkpoint_format import Manifest, step_of

_ALWAYS = ("samples", "rng")
_SAME_LAYOUTS = ("weights", "optimizer")


def contradictions(found: list[Certificate], run_dir: Path) -> list[str]:
    """Sentences on what does not agree within a run: steps taken twice, and checkpoints."""
    problems = []
    first: dict[int, list[Certificate]] = {}
    for one in found:
        earlier = first.setdefault(one.step, [])
        for other in earlier:
            problems += _differences(other, one, f"step {one.step}, taken twice")
        earlier.append(one)
    for path in list_checkpoints(run_dir / CHECKPOINTS):
        of_step = first.get(step_of(path), [])
        held = _hashes(read_manifest(path))
        if of_step and not any(held == (one.weights, one.optimizer) for one in of_step):
            problems.append(f"checkpoint {path.name} does not hold what step {step_of(path)} made")
    return list(dict.fromkeys(problems))


def disagreements(found: list[Certificate], others: list[Certificate], whose: str) -> list[str]:
    """Sentences on the steps of two runs that do not agree."""
    problems = []
    for one in found:
        for other in others:
            if one.step == other.step:
                problems += _differences(one, other, f"step {one.step}, here and in {whose}")
    if not {one.step for one in found} & {other.step for other in others}:
        problems.append(f"no certified step is in both this run and {whose}")
    return list(dict.fromkeys(problems))


def _differences(a: Certificate, b: Certificate, where: str) -> list[str]:
    compared = _ALWAYS + (_SAME_LAYOUTS if a.history == b.history else ())
    return [
        f"{where}: {name} {getattr(a, name)} and {getattr(b, name)}"
        for name in compared
        if getattr(a, name) != getattr(b, name)
    ]


def _hashes(manifest: Manifest) -> tuple[str, str]:
    """Of the weights and the optimizer state that a checkpoint holds."""
    digests = {name: int(entry.digest, 16) for name, entry in manifest.tensors.items()}

    def of(kind: str) -> str:
        return hash_of_tensors({n: d for n, d in digests.items() if n.startswith(kind)})

    return of("model."), of("optimizer.")
