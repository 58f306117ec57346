"""What a run reports, and to whom."""

from coterie.parallel.monitors.base import Monitor, RunFacts
from coterie.parallel.monitors.certificates import Certificates
from coterie.parallel.monitors.jsonl import JsonLines, LoadLines
from coterie.parallel.monitors.tensorboard import TensorBoard
from coterie.parallel.monitors.terminal import Terminal

__all__ = [
    "Certificates",
    "JsonLines",
    "LoadLines",
    "Monitor",
    "RunFacts",
    "TensorBoard",
    "Terminal",
]
