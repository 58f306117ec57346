"""What is measured: layers like those of the paper's models, on so many hosts, at such a rate."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers import Shape

COMPUTE, COMMUNICATION, PLAIN, TWO_CHUNKS = (
    "compute alone",
    "communication alone",
    "plain",
    "two chunks",
)
OVERLAPPED = "overlapped"
"""What the names of OverlappedExchange's settings begin with."""
TUNED = f"{OVERLAPPED}, tuned"
PASSES = {"forward": "forward", "both": "forward + backward"}
"""What is timed, and how it is called."""
CORES = 2
"""Of the machine; host n runs on core n modulo this."""
STEP = 64
"""Widths and numbers of tokens are multiples of this."""
WIDTHS = (64, 1024)
"""Beyond these the layers are no longer a model's, or no longer fit."""
ROWS = 32
"""That arrive at an expert at least, on average: with fewer, reading weights is all it does."""
MOST_TOKENS = 16384


@dataclass(frozen=True)
class Family:
    """E experts, K choices, F/D."""

    E: int
    K: int
    widening: float

    def shape(self, name: str, width: int, tokens: int) -> Shape:
        """The member of this width."""
        hidden = round(width * self.widening)
        return Shape(name, D=width, F=hidden, E=self.E, K=self.K, T=tokens)


FAMILIES = {
    "Mixtral": Family(E=8, K=2, widening=3.5),
    "Qwen2-MoE": Family(E=64, K=4, widening=0.6875),
    "Phi-3.5": Family(E=16, K=2, widening=1.5625),
}
HOSTS = (2, 4)
RATES = (200, 500, 1000, 2000)


@dataclass(frozen=True)
class Case:
    """A family's layer over ``hosts`` whose links have ``megabits`` a second each way."""

    family: str
    hosts: int
    megabits: int

    @property
    def name(self) -> str:
        return f"{self.family}, {self.hosts} hosts, {self.megabits} Mbit/s"

    def first_guess(self, seconds: float) -> Shape:
        """By 40 GFLOP/s for each core, and the rate."""
        family = FAMILIES[self.family]
        flops = 40e9 * min(1, CORES / self.hosts)
        remote = 1 - 1 / self.hosts
        byte_rate = self.megabits / 8 * 1e6
        width = _stepped(flops * remote * 8 / (6 * family.widening * byte_rate), WIDTHS)
        rows = seconds / 2 * byte_rate / (8 * width * remote)
        return family.shape(self.name, width, self._tokens(rows / family.K))

    def better(
        self, shape: Shape, compute: float, communication: float, seconds: float, ratio: float
    ) -> Shape:
        """A layer with about ``compute / communication = ratio`` that takes ``seconds``, judged by
        the seconds that ``shape`` takes.

        For each token, communication grows with the width, compute with its square.
        """
        family = FAMILIES[self.family]
        wanted = shape.D * min(2.0, max(0.5, ratio * communication / compute))
        width = _stepped(wanted, WIDTHS)
        wider = width / shape.D
        tokens = shape.T * seconds / (compute * wider**2 + communication * wider)
        better = family.shape(self.name, width, self._tokens(tokens))
        settled = width == shape.D and 0.8 < better.T / shape.T < 1.25
        return shape if settled else better

    def _tokens(self, wanted: float) -> int:
        family = FAMILIES[self.family]
        least = max(STEP, ROWS * family.E // (family.K * self.hosts))
        return _stepped(wanted, (least, MOST_TOKENS))


def _stepped(value: float, limits: tuple[int, int]) -> int:
    return min(max(STEP * round(value / STEP), limits[0]), limits[1])


@dataclass(frozen=True)
class Options:
    """How it is measured."""

    settings: Sequence[Sequence[int]]
    """(pieces, slabs) of the overlapped exchanges."""
    peers: bool = True
    """Other projects' layers too."""
    rounds: int = 7
    seconds: float = 0.24
    """That compute and communication of a forward pass are to take together."""
    time_limit: float = 300.0
    """Seconds for a case."""


def cases(
    families: Iterable[str] = tuple(FAMILIES),
    hosts: Iterable[int] = HOSTS,
    rates: Iterable[int] = RATES,
) -> list[Case]:
    """All of them."""
    return [Case(f, h, r) for h in hosts for f in families for r in rates]
