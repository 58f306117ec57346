"""The plan of blocks that only some tokens pass: operations, what is kept, what is sent."""

from collections import Counter
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coterie.comm.axis import Axes
from coterie.models import Decoder, DecoderConfig, initialise
from coterie.models.decoder import Block
from coterie.moe.tokens import TokenInfo
from coterie.parallel.distributed import make_groups
from coterie.parallel.layout import Layout
from coterie.parallel.planner.flops import stage_flops
from coterie.parallel.planner.pieces import Pieces
from coterie.parallel.planner.traffic import collectives
from coterie.parallel.planner.workload import Compute, Workload, workload_of
from tests.distributed import run_ranks
from tests.parallel.planner.measure import TREE, config_of
from tests.parallel.planner.saved import ROWS, SEQUENCE, model_config, saved_bytes
from tests.parallel.planner.test_traffic_run import SMALL, sent_in_a_step


def depths(layers: int = 2, **settings: Any) -> DecoderConfig:
    """A dense block, then one of experts; every token goes to all of them."""
    return model_config(
        layers=layers,
        moe={"experts": {"count": 2, "hidden": 48}, "router": {"k": 2, "z_loss": 0.0}},
        mixture_of_depths={"every": 1, "capacity": 0.25, **settings},
    )


def work_of(config: DecoderConfig, compute: str = "fp64", **layout: Any) -> Workload:
    return Workload(
        model=config,
        layout=Layout(**layout),
        blocks=(config.layers,),
        sequence=SEQUENCE,
        rows=ROWS,
        micro_batches=1,
        recompute="none",
        compute=cast(Compute, compute),
        device="cpu",
    )


def info_of(own: int) -> TokenInfo:
    """Facts of the tokens that a rank holds, ``own`` of each sequence."""
    tokens = torch.arange(ROWS * own)
    return TokenInfo(
        token_T=tokens,
        modality_T=tokens % 2,
        padding_T=torch.zeros_like(tokens).bool(),
        sequence_T=tokens // own,
        position_T=tokens % own,
        document_T=torch.zeros_like(tokens),
        key_T=tokens,
    )


def saved_by_blocks(config: DecoderConfig, compute: str, axes: Axes = Axes()) -> list[int]:
    """Bytes that autograd keeps of each block, on this rank."""
    torch.manual_seed(0)
    dtype = torch.float64 if compute == "fp64" else torch.float32
    model = Decoder(config, axes).to(dtype)
    initialise(model, 0, residual_branches=4)
    own = SEQUENCE // (axes.tp.size * axes.cp.size)
    x_BSD = torch.randn(ROWS, own, config.width, dtype=dtype, requires_grad=not config.auxiliary)
    found = []
    for block in model.blocks.values():
        assert isinstance(block, Block)

        def run(block: Block = block) -> Any:
            return block(x_BSD + 1, info_of(own))  # a leaf would be cast once under autocast

        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16"):
            found.append(saved_bytes(run, model))
    return found


def planned_by_blocks(work: Workload) -> list[int]:
    """The same; with the mask that keeps places which only fill from routing, as padding is kept:
    the plan counts none."""
    pieces = Pieces(work)
    kinds = ["choosing", "attention", "feed forward", "adding"]
    return [
        sum(
            pieces._piece((kind, experts if kind == "feed forward" else 0, True)).held.kept
            for kind in kinds
        )
        + (work.inside(1).own if experts else 0)
        for experts in (0, 2)
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "linear": {"score": "linear"},
    "predictor": {"predictor": True},
}


@pytest.mark.parametrize("compute", ["fp64", "bf16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_kept_is_what_autograd_saves(name: str, compute: str) -> None:
    config = depths(**SETTINGS[name])
    assert saved_by_blocks(config, compute) == planned_by_blocks(work_of(config, compute))


def saved_on_rank(rank: int, cases: list[tuple[dict[str, int], DecoderConfig]]) -> list[list[int]]:
    found = []
    for sizes, config in cases:
        ranks = make_groups(Layout(**sizes), torch.device("cpu"), timedelta(seconds=60))
        found.append(saved_by_blocks(config, "fp64", ranks.axes))
    return found


def test_kept_on_two_ranks_is_what_autograd_saves() -> None:
    cases = [({axis: 2}, depths(**SETTINGS[n])) for axis in ("tp", "cp") for n in SETTINGS]
    seen = run_ranks(2, saved_on_rank, cases, timeout=120.0)
    for number, (sizes, config) in enumerate(cases):
        # of cp's ranks one has the larger masks
        most = [max(blocks) for blocks in zip(*(rank[number] for rank in seen), strict=True)]
        assert most == planned_by_blocks(work_of(config, **sizes)), (sizes, config)


@pytest.mark.parametrize("predictor", [False, True])
def test_operations_are_those_of_the_tokens_that_pass(predictor: bool) -> None:
    config = depths(predictor=predictor, capacity=0.25)
    model = Decoder(config)
    initialise(model, 0)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(ROWS, SEQUENCE, dtype=torch.int64), info_of(SEQUENCE))
    # the counter sees neither attention's core on a CPU nor x · w, a matrix and a vector
    places = SEQUENCE // 4
    core = 2 * ROWS * (places * places // 2) * 4 * config.width
    scores = 2 * ROWS * SEQUENCE * 2 * config.width
    assert counter.get_total_flops() == stage_flops(work_of(config), 0).forward - core - scores
    plain = stage_flops(work_of(config.model_copy(update={"mixture_of_depths": None})), 0)
    assert counter.get_total_flops() < plain.forward / 2


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"cp": 2}], ids=str)
def test_bytes_of_a_real_step(parallel: dict[str, int], recompute: str) -> None:
    settings = {"capacity": 0.25, "first": 1, "predictor": True}  # blocks 1 and 3 of experts
    config = config_of(
        model={**TREE["model"], "dense_layers": [0, 1], "mixture_of_depths": settings},
        parallel=parallel,
        train={**TREE["train"], "recompute": recompute},
    )
    work = workload_of(config.model, config.parallel, config.train, config.data.sequence, 2)
    planned: Counter[str] = Counter()
    for collective in collectives(work, 0):
        size = collective.volume * collective.count
        planned[collective.op] += size if collective.volume > SMALL else 0
    for seen in run_ranks(2, sent_in_a_step, 2, config):
        assert seen == {op: pytest.approx(volume, rel=1e-6) for op, volume in planned.items()}
