"""What a layout costs, for all ranks, without starting a process.

Sizes (``workload``, ``parameters``), what autograd keeps (``activations``; of a block's halves
``attention_activations``, ``feed_forward_activations``), the order of a pipeline's micro-batches
(``schedule``), memory over a step (``memory``), bytes over links (``traffic``), time (``time``) and
a search over layouts (``search``).
"""
