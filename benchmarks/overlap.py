"""One mixture-of-experts layer over a real, slow network: rows that travel while others compute.

    python benchmarks/overlap.py [--hosts 2 4] [--rates 200 500 1000 2000] [--again]
    python benchmarks/overlap.py --write

Hosts are network namespaces behind links of a set rate (benchmarks/hosts.py: root and iproute2);
each runs one rank on one core, four share two cores. For each case a short calibration chooses the
layer's width and number of tokens such that compute and communication, each alone, take about
equally long. Then all contenders run in turn in the same processes, with fresh inputs each round:
compute alone, communication alone, the plain exchange, the two-chunk pipeline, the overlapped
exchange with some settings, and megatron-core's and DeepSpeed's layers.

Finished cases are in benchmarks/results/overlap.json and are not measured again without
``--again``. ``--write`` only writes docs/results/overlap.md and its picture from them.
"""

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import overlap_page
from benchmarks.overlaps.cases import FAMILIES, HOSTS, RATES, Case, Options, cases
from benchmarks.overlaps.lab import CaseFailed, measure, missing
from benchmarks.rows import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "overlap.json"
PAGES = ROOT / "docs" / "results"


class Results:
    """The JSON file, written anew after every case."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # before the first result makes the tree another than the commit's
        self.machine = machine() | {"threads": 1, "command": " ".join(["python", *sys.argv])}
        self.found: dict[str, Any] = {"machine": {}, "results": {}}
        if path.exists():
            self.found |= json.loads(path.read_text())

    def add(self, case: Case, options: Options, result: dict[str, Any]) -> None:
        """One more case; it replaces an earlier one of the same name."""
        self.found["machine"] = self.machine
        commit = self.found["machine"]["commit"]
        self.found["results"][case.name] = (
            asdict(case)
            | result
            | {
                "rounds": options.rounds,
                "commit": commit,
            }
        )
        order = {known.name: place for place, known in enumerate(cases())}
        self.found["results"] = dict(
            sorted(self.found["results"].items(), key=lambda item: order.get(item[0], len(order)))
        )
        self.found = _rounded(self.found)  # as it will be read
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.found, indent=1) + "\n")
        fresh.replace(self.path)


def _rounded(value: Any) -> Any:
    """Floats to four digits: more is noise."""
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list():
            return [_rounded(item) for item in value]
    return value


def _line(result: dict[str, Any]) -> str:
    """A case in one line."""
    size = ", ".join(f"{letter} {value}" for letter, value in result["shape"].items())
    parts = []
    for name, passes in result["contenders"].items():
        forward, both = passes["forward"], passes["both"]
        figure = f"{name} {forward['ms']:.0f}, {both['ms']:.0f} ms"
        if "speed_up" in forward:
            figure += f" ({forward['speed_up']:.2f}, {both['speed_up']:.2f}×)"
        parts.append(figure)
    return f"  {size}; {result['seconds']:.0f} s\n  " + "\n  ".join(parts)


def _options(arguments: argparse.Namespace) -> Options:
    settings = [tuple(map(int, setting.split("x"))) for setting in arguments.overlapped]
    if arguments.quick:
        return Options(settings[:1], not arguments.no_peers, rounds=2, seconds=0.02, time_limit=180)
    return Options(settings, not arguments.no_peers, arguments.rounds)


def main() -> int:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--hosts", nargs="+", type=int, default=list(HOSTS))
    parser.add_argument("--rates", nargs="+", type=int, default=list(RATES), help="Mbit/s")
    parser.add_argument(
        "--overlapped",
        nargs="*",
        default=["2x1", "4x1", "1x4"],
        metavar="PxS",
        help="settings of the overlapped exchange: pieces x slabs",
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each contender")
    parser.add_argument("--no-peers", action="store_true", help="without other projects' layers")
    parser.add_argument("--quick", action="store_true", help="tiny layers, to see that all runs")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--write", action="store_true", help="only write the page")
    parser.add_argument("--json", type=Path, help="where the figures go; then no page is written")
    parser.add_argument("--out", type=Path, help="where the page goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:
            arguments.json = arguments.json or Path(scratch) / "overlap.json"
        elif arguments.json is None:
            arguments.json, arguments.out = RESULTS, arguments.out or PAGES
        try:
            return _run(arguments)
        except KeyboardInterrupt:
            print("interrupted: finished cases are kept, the same command goes on", file=sys.stderr)
            return 130


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.write and (lacking := missing()):
        print(f"hosts cannot be made here: {lacking}", file=sys.stderr)
        return 2
    results, options, failed = Results(arguments.json), _options(arguments), False
    wanted = cases(arguments.families, arguments.hosts, arguments.rates)
    if not arguments.again:
        wanted = [case for case in wanted if case.name not in results.found["results"]]
    for number, case in enumerate([] if arguments.write else wanted, 1):
        print(f"{number}/{len(wanted)} {case.name}", flush=True)
        try:
            result = measure(case, options)
        except CaseFailed as failure:
            print(failure, file=sys.stderr, flush=True)
            failed = True
            continue
        results.add(case, options, result)
        print(_line(result), flush=True)
    if arguments.out:
        overlap_page.write(results.found, arguments.out)
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the hosts are gone then too
    sys.exit(main())
