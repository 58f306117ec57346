"""The load of experts in every layout: what plain loops over the routers' rows count, each once."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from coterie.comm.objects import gather_objects
from coterie.launch.config import RunConfig
from coterie.moe.experts import Experts
from coterie.moe.routers.base import Routing
from coterie.moe.tokens import TokenInfo
from coterie.parallel import tally
from coterie.parallel.distributed import Ranks
from coterie.parallel.load import LayerLoad, LoadWindow
from coterie.parallel.model import ParallelModel
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.step import StepSettings, train_step
from tests.conformance.worker import ranks_of
from tests.distributed import run_ranks
from tests.parallel.tiny import ALONE, load_of, model_of, sampler_of, tiny_config

MODELS: dict[str, dict[str, Any]] = {
    "top_k": {"router": {"k": 2, "capacity_factor": 0.6, "jitter": 0.1}},
    "random_fixed": {"router": {"kind": "random_fixed", "k": 3}},
    "expert_choice": {"router": {"kind": "expert_choice"}},
    "modality": {"router": {"kind": "modality", "experts": [6, 2]}},
    "hash": {"router": {"kind": "hash", "k": 2}},
    "sinkhorn": {"router": {"kind": "sinkhorn", "k": 2}},
    "mixture of depths": {"router": {"k": 2}, "mixture_of_depths": {"first": 1, "capacity": 0.5}},
    "pyramid": {"router": {"k": 1}, "expert_counts": [4, 8]},
    "shared depth": {"router": {"k": 2}, "layers": 4, "dense_layers": [2, 3], "shared_depth": 2},
}
UNROUTED = ("top_k", "expert_choice", "modality")
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "expert parallel": ("full", {"ep": 4}),
    "two groups, sharded": ("selective", {"ep": 2, "dp_shard": 2}),
    "tensor and context parallel": ("full", {"tp": 2, "cp": 2, "ep": 2}),
    "sliced experts": ("none", {"tp": 2, "etp": 2, "ep": 2}),
    "1f1b": ("full", {"pp": 2, "ep": 2}),
    "zero bubble": ("none", {"pp": 2, "schedule": "zero_bubble", "ep": 2}),
    "zbv": ("none", {"pp": 2, "vpp": 2, "schedule": "zbv", "stages": [0, 1, 1, 1], "ep": 2}),
}


def config_of(data: Path, name: str, layout: str | None = None) -> RunConfig:
    recompute, parallel = LAYOUTS[layout] if layout else ("none", {})
    train = {"steps": 1, "accumulation": 2, "precision": "fp64", "recompute": recompute}
    tree = tiny_config(data, train=train, parallel=parallel).model_dump(mode="json")
    model = dict(MODELS[name])
    tree["model"]["attention"]["kv_heads"] = 2
    tree["model"]["moe"]["router"] = model.pop("router")
    tree["model"] |= model
    if model.get("layers") == 4 and "stages" in parallel:
        tree["parallel"]["stages"] = [0, 2, 2, 0]  # blocks that share stay together
    return RunConfig.model_validate(tree)


def in_backward() -> bool:
    """A pass that recomputes: it must not count."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def watched(model: ParallelModel) -> Iterator[tuple[Counter[Any], Counter[int]]]:
    """What this rank's routers decide, row by row, and how many rows its experts get, by layer."""
    seen: Counter[Any] = Counter()
    received: Counter[int] = Counter()
    layer_of: dict[Any, int] = {}

    def decided(router: Any, args: tuple[Tensor, TokenInfo], routing: Routing) -> None:
        info, layer = args[1], layer_of[router]
        assert info.modality_T is not None and info.padding_T is not None
        if in_backward():
            return
        modality, padding = info.modality_T.tolist(), info.padding_T.tolist()
        rows = [0] * len(modality)
        for token, expert in zip(
            routing.assignment.token_A.tolist(), routing.assignment.expert_A.tolist(), strict=True
        ):
            seen[layer, "rows", modality[token], expert] += 1
            rows[token] += 1
        for token, number in enumerate(rows):
            if not padding[token]:
                seen[layer, "tokens", modality[token]] += 1
                seen[layer, "unrouted", modality[token]] += number == 0

    right = Experts.forward

    def computed(self: Experts, x_AD: Tensor, load_E: Tensor) -> Tensor:
        if not in_backward():
            received[layer_of[self]] += x_AD.shape[0]
        return right(self, x_AD, load_E)

    with ExitStack() as stack:
        for decoder in model.decoders:
            for number, block in decoder.blocks.items():
                moe: Any = block.moe
                if moe is not None and moe.router not in layer_of:
                    layer_of |= {moe.router: int(number), moe.experts: int(number)}
                    hook = moe.router.register_forward_hook(decided)
                    stack.callback(hook.remove)
        stack.enter_context(patch.object(Experts, "forward", computed))
        yield seen, received


Found = dict[int, LayerLoad]


def one_step(config: RunConfig, ranks: Ranks) -> tuple[Found, Counter[Any], Counter[int]]:
    """The report's loads; over all ranks what was seen; on this one what was received."""
    model = model_of(config, ranks)
    optimizer = Optimizer(model, config.optimizer)
    parts, dp = config.train.accumulation, ranks.layout.dp
    sampler = sampler_of(config)
    batches = [sampler.batch(0, micro, parts, ranks.place.dp, dp) for micro in range(parts)]
    settings = StepSettings("fp64", None, config.train.seed)
    with watched(model) as (seen, received):
        layers = train_step(model, optimizer, batches, 1, settings).layers
    everyone: Counter[Any] = Counter()
    for part in gather_objects(seen, ranks.control):
        everyone.update(part)
    return layers, everyone, received


def agrees(config: RunConfig, layers: Found, seen: Counter[Any]) -> None:
    """The counts that stand in the report are those of the loops."""
    sums: dict[int, LayerLoad] = {}
    for layer, load in layers.items():  # layers that share a router are seen as one
        first = config.model.first_like(layer)
        sums[first] = sums[first] + load if first in sums else load
    assert sums.keys() == {key[0] for key in seen}
    for layer, load in sums.items():
        experts = range(config.model.experts_of(layer))
        rows = [[seen[layer, "rows", m, e] for e in experts] for m in (0, 1)]
        assert load.rows_ME.tolist() == rows
        for name, counts in (("tokens", load.tokens_M), ("unrouted", load.unrouted_M)):
            assert counts.tolist() == [seen[layer, name, m] for m in (0, 1)], name


def on_ranks(rank: int, configs: dict[str, RunConfig]) -> dict[str, Found]:
    """Each model's step; compared here with what the ranks saw."""
    found = {}
    for name, config in configs.items():
        ranks = ranks_of(config, 4)
        layers, seen, received = one_step(config, ranks)
        agrees(config, layers, seen)
        layout, place = ranks.layout, ranks.place
        group = place.expert_replicate * layout.expert_shard + place.expert_shard
        for first, rows in received.items():
            mine = group * layout.ep + place.ep
            same = [n for n in layers if config.model.first_like(n) == first]
            assert sum(layers[n].rows_R[mine] for n in same) == rows, (name, first)
        for load in layers.values():
            assert load.rows_R.size * layout.etp == layout.stage_ranks
            assert load.rows_R.sum() == load.rows
        found[name] = layers
    return found


@pytest.fixture(scope="module")
def alone(data: Path) -> dict[str, Found]:
    """By one process, and counted there too."""
    found = {}
    for name in MODELS:
        config = config_of(data, name)
        found[name], seen, _ = one_step(config, ALONE)
        agrees(config, found[name], seen)
        for load in found[name].values():
            assert load.rows_R.tolist() == [load.rows]
    return found


def test_the_counts_are_worth_comparing(alone: dict[str, Found]) -> None:
    """Both modalities, drops and unrouted tokens occur where they can."""
    for name, layers in alone.items():
        for load in layers.values():
            assert load.tokens_M.min() > 0 and load.rows_ME.sum(1).min() > 0
            assert (load.unrouted > 0) == (name in UNROUTED), name
            assert (load.dropped > 0) == (name == "top_k")
    assert [load.rows_E.size for load in alone["pyramid"].values()] == [4, 8]
    skipping, passing = (alone["mixture of depths"][layer].tokens_M.sum() for layer in (1, 2))
    assert 0.4 < skipping / passing < 0.6  # a layer counts the tokens that it sees
    assert list(alone["shared depth"]) == [0, 1]
    text, image = alone["modality"][1].rows_ME
    assert not (text * image).any()  # an expert is of one modality


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_of_one_process(layout: str, alone: dict[str, Found], data: Path) -> None:
    configs = {name: config_of(data, name, layout) for name in MODELS}
    if layout in ("1f1b", "zero bubble", "zbv"):
        configs = {name: configs[name] for name in ("top_k", "expert_choice")}
    for found in run_ranks(4, on_ranks, configs, timeout=240):
        for name, layers in found.items():
            assert layers.keys() == alone[name].keys()
            for layer, ours in layers.items():
                truth = alone[name][layer]
                for field in ("rows_ME", "dropped_E", "tokens_M", "unrouted_M"):
                    assert getattr(ours, field).tolist() == getattr(truth, field).tolist(), field
                assert ours.entropy == pytest.approx(truth.entropy, rel=1e-9)


def test_a_count_that_recompute_repeats_is_noticed(data: Path) -> None:
    """The loops stand apart from the code: they do not count twice what it counts twice."""
    right = tally.Tally.routing
    config = config_of(data, "hash")

    def twice(self: tally.Tally, losses: Any, stats: Any) -> None:
        right(self, losses, stats)
        right(self, {}, stats)

    with patch.object(tally.Tally, "routing", twice):
        layers, seen, _ = one_step(config, ALONE)
    with pytest.raises(AssertionError):
        agrees(config, layers, seen)


# --- what follows from the counts ---------------------------------------------------------------


def test_figures_of_a_layer() -> None:
    load = load_of([[6, 0, 2], [0, 0, 4]], dropped_E=[1, 0, 2], unrouted_M=[3, 1], rows_R=[9, 3])
    assert load.rows_E.tolist() == [6, 0, 6] and load.rows == 12
    assert (load.dropped, load.unrouted, load.dead) == (3, 4, 1)
    assert (load.skew, load.rank_skew) == (1.5, 1.5)
    idle = load_of([[0, 0]])
    assert (idle.skew, idle.rank_skew, idle.dead) == (0, 0, 2)


def test_a_window_adds_up_and_is_emptied() -> None:
    window = LoadWindow()
    window.add({1: load_of([[1, 0]], tokens_M=[1], entropy=3.0)})
    window.add({1: load_of([[2, 4]], tokens_M=[3], entropy=1.0, dropped_E=[0, 5])})
    assert window.steps == 2
    load = window.take()[1]
    assert load.rows_ME.tolist() == [[3, 4]] and load.rows_R.tolist() == [7]
    assert load.entropy == 1.5 and load.dropped == 5 and load.dead == 0
    assert window.steps == 0 and window.take() == {}
