"""An overlapped exchange between ranks that live in one process: the oracle of the fused kernels.

Peers' buffers are ordinary tensors. Every rank has workers, each a fixed list of steps; they meet
in flags alone, counters that only rise (``steps``). Ranks know the plan (``group``); rows go to the
experts and results come back (``passes``), in the forward pass (``forward``) and with the gradients
in the backward pass (``backward``). Whoever runs the steps may choose any order that respects the
flags, and the result is the same to the bit: no sum depends on order.

The steps, flags and orders are those of Comet (arXiv 2502.19811, section 3.2): dispatch is split by
rows, tiles start as soon as their rows are there; the way back is split by columns ("slabs"), slab
after slab over all tiles, so that the first leaves while the next is computed.

Legend, beside that of ``plan``: H width of the first product, F of what the second takes.
"""
