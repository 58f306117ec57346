"""Overlap as frameworks do it without fused kernels: chunks, and a stream for each of their ways.

While one chunk is computed, the next one's rows arrive and the last one's results leave. The link
is emulated by a kernel of one thread that waits as long as the link needs; nothing is copied. So
this baseline's communication takes no multiprocessor and no memory, and both directions run at
once: it is faster than what it stands for.
"""

import time
from collections.abc import Callable, Sequence

import torch

_WAIT = """
extern "C" __global__ void coterie_wait(int ns) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < static_cast<unsigned long long>(ns));
}
"""


class TwoStreams:
    """Runs chunks over an emulated link."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self.kernel = torch.cuda._compile_kernel(_WAIT, "coterie_wait")
            self.arrivals, self.departures = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def wait(self, ms: float) -> None:
        """On the current stream, as long as the link needs."""
        if self.on_gpu:
            self.kernel(grid=(1, 1, 1), block=(1, 1, 1), args=[int(ms * 1e6)])
        else:
            time.sleep(ms / 1e3)

    def run(
        self,
        chunks: Sequence[Callable[[], object]],
        ms: float,
        rest: Callable[[], object] | None = None,
    ) -> None:
        """``chunks`` compute; each one's rows need ``ms`` on each way. rest: what is computed last,
        for nobody."""
        if not self.on_gpu:
            for chunk in chunks:
                self.wait(ms)
                chunk()
                self.wait(ms)
            if rest:
                rest()
            return
        main = torch.cuda.current_stream()
        self.arrivals.wait_stream(main)
        self.departures.wait_stream(main)
        for chunk in chunks:
            with torch.cuda.stream(self.arrivals):
                self.wait(ms)
                arrived = self.arrivals.record_event()
            main.wait_event(arrived)
            chunk()
            self.departures.wait_event(main.record_event())
            with torch.cuda.stream(self.departures):
                self.wait(ms)
        if rest:
            rest()
        main.wait_stream(self.departures)
