"""Hosts of one machine: network namespaces on a bridge, each behind a link of its own rate.

Needs root and iproute2 (``ip``, ``tc``, ``nsenter``). A host has its own network and nothing else:
processors and memory are shared, unless a command is pinned to a core.
"""

import fcntl
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_BRIDGE = "coterie"
_NETWORK = "10.78.0"
_MTU = 9000
"""Jumbo frames, as clusters have them. With 1500 bytes the shaping of each packet takes so much of
the processor (a quarter of it at 200 Mbit/s) that one measures that."""
_LOCK = Path("/run/coterie-hosts.lock")


@dataclass(frozen=True)
class Host:
    """One of them."""

    number: int

    @property
    def namespace(self) -> str:
        return f"{_BRIDGE}{self.number}"

    @property
    def address(self) -> str:
        return f"{_NETWORK}.{10 + self.number}"

    def start(
        self, command: Sequence[str], core: int, environment: dict[str, str], output: IO[str]
    ) -> subprocess.Popen[str]:
        """Run ``command`` there, on one core of the machine; all it prints goes to ``output``."""
        inside = ["nsenter", f"--net=/run/netns/{self.namespace}", "taskset", "-c", str(core)]
        return subprocess.Popen(
            [*inside, *command],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """``count`` hosts that reach each other, gone afterwards. Waits for another process's."""
    with alone():
        yield from _hosts([Host(number) for number in range(count)])


@contextmanager
def alone() -> Iterator[None]:
    """While no other process has hosts."""
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def left() -> list[tuple[str, str]]:
    """Namespaces ("netns") and ends of cables ("link") that there are, by their names."""
    found = []
    for kind in ("netns", "link"):
        listing = json.loads(_run(f"ip -json {kind} list") or "[]")
        names = [entry.get("name") or entry["ifname"] for entry in listing]
        found += [(kind, name) for name in names if re.fullmatch(rf"{_BRIDGE}(\d+p?)?", name)]
    return found


def _hosts(made: list[Host]) -> Iterator[list[Host]]:
    _remove()  # what a killed process has left
    try:
        _run(f"ip link add {_BRIDGE} type bridge")
        _run(f"ip link set {_BRIDGE} up")
        for host in made:
            port = f"{host.namespace}p"
            _run(f"ip netns add {host.namespace}")
            peer = f"eth0 mtu {_MTU} netns {host.namespace}"
            _run(f"ip link add {port} mtu {_MTU} type veth peer name {peer}")
            _run(f"ip link set {port} master {_BRIDGE} up")
            _inside(host, f"ip addr add {host.address}/24 dev eth0")
            _inside(host, "ip link set eth0 up")
            _inside(host, "ip link set lo up")
        yield made
    finally:
        _remove()


def shape(made: Sequence[Host], megabits: float | None) -> None:
    """Limit every host's link to ``megabits`` a second in each direction; None: no limit."""
    for host in made:
        for run, device in (
            (_run, f"{host.namespace}p"),
            (lambda command, host=host: _inside(host, command), "eth0"),
        ):
            if megabits is None:
                run(f"tc qdisc replace dev {device} root pfifo")
            else:
                run(
                    f"tc qdisc replace dev {device} root tbf rate {megabits:g}mbit burst 64k "
                    "latency 50ms"
                )


def _remove() -> None:
    for kind, name in left():
        # a cable may have gone with its namespace
        subprocess.run(["ip", kind, "del", name], capture_output=True)


def _inside(host: Host, command: str) -> None:
    _run(f"nsenter --net=/run/netns/{host.namespace} {command}")


def _run(command: str) -> str:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
    return done.stdout
