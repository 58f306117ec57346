"""A mixture of experts made of a trained model: its function where that can be, in any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.errors import UserError
from coterie.launch.config import RunConfig
from coterie.launch.upcycling import make_run
from coterie.models import Decoder
from coterie.moe.routers.modality import modality_of_experts
from coterie.parallel import upcycle
from coterie.parallel.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    load_tensors,
    read_manifest,
    read_state,
    verify,
)
from coterie.parallel.layout import LayoutConfig
from coterie.parallel.micro_batch import token_info
from coterie.parallel.model import ParallelModel
from coterie.parallel.optimizer import Optimizer, learning_rate
from coterie.parallel.run_state import model_parts, optimizer_parts
from tests.conformance.worker import ranks_of
from tests.distributed import run_ranks
from tests.moe.tiny import error
from tests.parallel.tiny import (
    ALONE,
    Recorder,
    checkpointer_of,
    decoder_of,
    model_of,
    sampler_of,
    tiny_config,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HIDDEN, STEP = 16, 2
DENSE: dict[str, Any] = {"moe": None, "dense_layers": []}
ONE_EACH = {
    "experts": {"count": 2, "hidden": HIDDEN},
    "router": {"kind": "modality", "experts": [1, 1]},
}
TOP_2 = {"experts": {"count": 4, "hidden": HIDDEN}, "router": {"k": 2}}
FOUR_EACH = {
    "experts": {"count": 8, "hidden": HIDDEN},
    "router": {"kind": "modality", "experts": [5, 3]},
}
SLICES = {
    "experts": {"count": 4, "hidden": HIDDEN // 4},
    "router": {"kind": "random_fixed", "k": 4},
}


def config_of(data: Path, model: dict[str, Any], **sections: Any) -> RunConfig:
    """A model whose layers are all of one kind, the first dense where there are mixtures."""
    return tiny_config(data, model={"dense_layers": [0], **model}, **sections)


def save(config: RunConfig, run: Path, world: int = 1) -> Path:
    """A checkpoint of ``config`` with weights that no run starts with, its moments not zero."""
    ranks = ranks_of(config, world)
    model = model_of(config, ranks)
    optimizer = Optimizer(model, config.optimizer)
    sampler = sampler_of(config)
    sampler.consumed = STEP
    parts = {**model_parts(model), **optimizer_parts(model, optimizer)}
    with torch.no_grad():
        for name, part in parts.items():
            part.tensor.mul_(1.5).add_(0.1 if "norm" in name else 0.01)
    state = {
        "config": config.model_dump(mode="json"),
        "step": STEP,
        "history": ["one process"],
        "sampler": sampler.state_dict(),
    }
    with Checkpointer(run / "checkpoints", CheckpointConfig(), ranks.saving) as checkpointer:
        checkpointer.save(STEP, parts, state)
    return run / "checkpoints" / f"step_{STEP:08d}"


def save_on_rank(rank: int, configs: list[RunConfig], folder: Path) -> None:
    for number, config in enumerate(configs):
        save(config, folder / f"old_{number}", 2)


def grown(source: Path, config: RunConfig, run: Path, how: Any = "copy", world: int = 1) -> Path:
    """The checkpoint of step 0 of a run of ``config``."""
    make_run(source, config, run, world, how, lambda _: None)
    path = run / "checkpoints" / "step_00000000"
    verify(path)
    return path


def loaded(config: RunConfig, checkpoint: Path) -> ParallelModel:
    model = model_of(config, ALONE)
    load_tensors(checkpoint, model_parts(model), strict=False)
    return model


def logits(model: ParallelModel, config: RunConfig) -> Tensor:
    batch = sampler_of(config).batch(0)
    decoder: Decoder = decoder_of(model)
    with torch.no_grad():
        return decoder.eval()(batch.tokens_BS, token_info(batch, ALONE.axes)).x[~batch.padding_BS]


@pytest.fixture
def dense(data: Path, tmp_path: Path) -> tuple[RunConfig, Path]:
    config = config_of(data, DENSE)
    return config, save(config, tmp_path / "dense")


def weights_of(checkpoint: Path, config: RunConfig) -> dict[str, Tensor]:
    model = decoder_of(loaded(config, checkpoint))
    return {name: p.detach() for name, p in model.named_parameters()}


def digests(checkpoint: Path) -> dict[str, str]:
    return {name: entry.digest for name, entry in read_manifest(checkpoint).tensors.items()}


RENORMALISED: dict[str, dict[str, Any]] = {
    "top-2": TOP_2,
    "sigmoids, scaled": {**TOP_2, "router": {"k": 3, "score": "sigmoid", "scale": 2.5}},
    "random": {**TOP_2, "router": {"kind": "random_fixed", "k": 3, "scale": 4.0}},
    "hash": {**TOP_2, "router": {"kind": "hash", "k": 2}},
}


@pytest.mark.parametrize("case", RENORMALISED)
def test_copies_whose_weights_sum_to_one_are_the_trained_model(
    case: str, dense: tuple[RunConfig, Path], data: Path, tmp_path: Path
) -> None:
    old, source = dense
    new = config_of(data, {"moe": RENORMALISED[case]})
    model = loaded(new, grown(source, new, tmp_path / "new"))
    right = logits(loaded(old, source), old)
    assert error(logits(model, new), right) < 1e-12
    with torch.no_grad():  # it could fail
        decoder_of(model).blocks["1"].moe.experts.w_out_EFD[1:].mul_(1.1)
    assert error(logits(model, new), right) > 1e-4


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "random_fixed", "k": 4},
        {"kind": "random_fixed", "k": 4, "scale": 4.0},
        {"k": 4, "scale": 0.5},
    ],
    ids=str,
)
def test_all_slices_with_equal_weights_are_the_trained_model(
    router: dict[str, Any], dense: tuple[RunConfig, Path], data: Path, tmp_path: Path
) -> None:
    old, source = dense
    new = config_of(data, {"moe": {**SLICES, "router": router}})
    model = loaded(new, grown(source, new, tmp_path / "new", "slice"))
    right = logits(loaded(old, source), old)
    assert error(logits(model, new), right) > 1e-6  # routers are near to it, not there
    with torch.no_grad():
        for _, one in decoder_of(model).routers():
            one.weight.zero_()
    assert error(logits(model, new), right) < 1e-12


def test_experts_are_copies_of_their_modalitys(data: Path, tmp_path: Path) -> None:
    old, new = config_of(data, {"moe": ONE_EACH}), config_of(data, {"moe": FOUR_EACH})
    source = save(old, tmp_path / "old")
    before = weights_of(source, old)
    after = weights_of(grown(source, new, tmp_path / "new"), new)
    assert modality_of_experts((5, 3)) != tuple(sorted(modality_of_experts((5, 3))))
    for name, weight in after.items():
        if ".experts." in name:
            assert not torch.equal(before[name][0], before[name][1])
            for expert, modality in enumerate(modality_of_experts((5, 3))):
                assert torch.equal(weight[expert], before[name][modality]), name
        elif ".router." not in name:
            assert torch.equal(weight, before[name]), name


def test_a_dense_layer_is_copied_for_all_modalities(
    dense: tuple[RunConfig, Path], data: Path, tmp_path: Path
) -> None:
    old, source = dense
    new = config_of(data, {"moe": FOUR_EACH})
    before, after = weights_of(source, old), weights_of(grown(source, new, tmp_path / "new"), new)
    for theirs, ours in (("w_in_PFD", "w_in_EPFD"), ("w_out_FD", "w_out_EFD")):
        for weight in after[f"blocks.2.moe.experts.{ours}"]:
            assert torch.equal(weight, before[f"blocks.2.feed_forward.{theirs}"])


def test_untied_feed_forwards_are_copied_for_their_modality(data: Path, tmp_path: Path) -> None:
    old = config_of(data, {**DENSE, "untie": {"ffn": True}})
    new = config_of(data, {"moe": FOUR_EACH, "dense_layers": []})
    source = save(old, tmp_path / "old")
    before, after = weights_of(source, old), weights_of(grown(source, new, tmp_path / "new"), new)
    for expert, modality in enumerate(modality_of_experts((5, 3))):
        ours = after["blocks.1.moe.experts.w_in_EPFD"][expert]
        assert torch.equal(ours, before["blocks.1.feed_forward.w_in_MPFD"][modality])
        assert not torch.equal(ours, before["blocks.1.feed_forward.w_in_MPFD"][1 - modality])


def test_routers_are_those_of_a_fresh_run(
    dense: tuple[RunConfig, Path], data: Path, tmp_path: Path
) -> None:
    _, source = dense
    new = config_of(data, {"moe": FOUR_EACH, "width": 16})
    after = weights_of(grown(source, new, tmp_path / "new"), new)
    started = dict(decoder_of(model_of(new, ALONE)).named_parameters())
    names = [name for name in after if ".router." in name]
    assert len(names) == 2
    for name in names:
        assert torch.equal(after[name], started[name])
        assert 0.015 < float(after[name].std()) < 0.025


def test_a_mixture_that_stays_keeps_its_router(data: Path, tmp_path: Path) -> None:
    old = config_of(data, {"moe": TOP_2, "dense_layers": [0, 1]})
    router = {"k": 2, "balance_loss": 0.0}  # a setting that may change
    new = config_of(data, {"moe": {**TOP_2, "router": router}, "dense_layers": [0]})
    source = save(old, tmp_path / "old")
    before, after = weights_of(source, old), weights_of(grown(source, new, tmp_path / "new"), new)
    kept = "blocks.2.moe.router.weight"
    assert torch.equal(before[kept], after[kept])
    assert (
        error(
            logits(loaded(new, tmp_path / "new/checkpoints/step_00000000"), new),
            logits(loaded(old, source), old),
        )
        < 1e-12
    )


def test_untying_gives_each_modality_the_shared_weights(
    dense: tuple[RunConfig, Path], data: Path, tmp_path: Path
) -> None:
    old, source = dense
    new = config_of(data, {**DENSE, "untie": {"ffn": True, "qkvo": True, "norm": True}})
    model = loaded(new, grown(source, new, tmp_path / "new"))
    assert error(logits(model, new), logits(loaded(old, source), old)) < 1e-12


LAYOUTS = [LayoutConfig(**{axis: 2}) for axis in ("ep", "tp", "pp", "dp_shard")]


def test_from_any_layout_and_into_any(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Digests do not depend on how tensors are cut: all must have those of one process."""
    attention = {"heads": 2, "kv_heads": 2}
    old = config_of(data, {"moe": ONE_EACH, "attention": attention})
    new = config_of(data, {"moe": FOUR_EACH, "attention": attention})
    right = digests(grown(save(old, tmp_path / "one"), new, tmp_path / "right"))
    monkeypatch.setattr(upcycle, "PIECE", 5000)  # several pieces of a tensor
    split = [old.model_copy(update={"parallel": layout}) for layout in LAYOUTS]
    run_ranks(2, save_on_rank, split, tmp_path)
    for number, layout in enumerate(LAYOUTS):
        source = tmp_path / f"old_{number}" / "checkpoints" / f"step_{STEP:08d}"
        assert read_manifest(source).world_size == 2
        into = new.model_copy(update={"parallel": layout})
        made = grown(source, into, tmp_path / f"new_{number}", world=2)
        assert read_manifest(made).world_size == 2 and len(list(made.glob("rank_*"))) == 2
        assert digests(made) == right, layout


def test_the_new_run_goes_on_with_the_data_and_begins_its_schedules(
    dense: tuple[RunConfig, Path], data: Path, tmp_path: Path
) -> None:
    old, source = dense
    steps = {"steps": 4, "global_batch": 4, "accumulation": 2, "precision": "fp64", "seed": 3}
    new = config_of(data, {"moe": SLICES}, train=steps, checkpoint={"every": 2})
    run = tmp_path / "new"
    made = grown(source, new, run, "slice")
    assert read_state(made)["step"] == 0
    assert read_state(made)["sampler"]["consumed"] == STEP * old.train.global_batch // 4
    ends = []
    for begin in (0, 2):
        with checkpointer_of(new, run, ALONE) as checkpointer:
            recorder = Recorder()
            trainer = trainer_of(new, ALONE, checkpointer, [recorder])
            trainer.restore(run / "checkpoints" / f"step_{begin:08d}")
            assert trainer.step == begin
            first = trainer._batches()[0].sample_B
            assert first[0] == STEP * old.train.global_batch + begin * 4
            trainer.run(run)
        reports = recorder.reports
        assert [r["step"] for r in reports] == list(range(begin + 1, 5))
        assert [r["lr"] for r in reports] == [
            learning_rate(step, 4, new.optimizer) for step in range(begin, 4)
        ]
        end = run / "checkpoints" / "step_00000004"
        assert read_state(end)["sampler"]["consumed"] == 8
        ends.append(digests(end))
    assert ends[0] == ends[1]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[str, ...]]] = {
    "width": ({**DENSE}, {"moe": TOP_2, "width": 32}, "copy", ("model.width is 32", "was 16")),
    "heads": (
        DENSE,
        {"moe": TOP_2, "attention": {"heads": 4, "kv_heads": 1, "qk_norm": True}},
        "copy",
        ("model.attention.heads is 4", "was 2"),
    ),
    "hidden": (
        DENSE,
        {"moe": SLICES},
        "copy",
        ("model.moe.experts.hidden is 4", "layer 1 has 16"),
    ),
    "slices": (DENSE, {"moe": TOP_2}, "slice", ("hidden is 16", "4 experts have 64", "has 16")),
    "activation": (
        DENSE,
        {"moe": {**TOP_2, "experts": {"count": 4, "hidden": 16, "activation": "gelu"}}},
        "copy",
        ("activation is gelu", "has swiglu"),
    ),
    "weights without a sum": (
        DENSE,
        {"moe": {**SLICES, "router": {"kind": "expert_choice"}}},
        "slice",
        ("constant sum", "kind is expert_choice"),
    ),
    "weights without a sum where tokens may skip": (
        DENSE,
        {
            "moe": {
                **SLICES,
                "router": {"kind": "mlp", "renormalise": True, "skip": True, "bias_update": 0.1},
            }
        },
        "slice",
        ("mlp with renormalise and without skip", "kind is mlp"),
    ),
    "other depths": (
        {**DENSE, "mixture_of_depths": {"capacity": 0.5}},
        {"moe": TOP_2, "mixture_of_depths": {"capacity": 0.25}},
        "copy",
        ("model.mixture_of_depths.capacity is 0.25, but was 0.5",),
    ),
    "depths that were none": (
        DENSE,
        {"moe": TOP_2, "mixture_of_depths": {"capacity": 0.5}},
        "copy",
        (
            "model.mixture_of_depths is {capacity: 0.5, every: 2, first: 0, score: sigmoid, "
            "predictor: false, auxiliary: false}, but was null",
        ),
    ),
    "modalities into none": (
        {"moe": ONE_EACH},
        {"moe": TOP_2},
        "copy",
        ("feed-forwards of 2 modalities", "experts are of 1"),
    ),
    "many experts already": (
        {"moe": TOP_2},
        {"moe": {**TOP_2, "experts": {"count": 8, "hidden": 16}}},
        "copy",
        ("layer 1 has 4 experts in the trained run",),
    ),
    "back to dense": ({"moe": TOP_2}, DENSE, "copy", ("has nothing to make it of",)),
    "shared experts": (
        DENSE,
        {"moe": {**TOP_2, "shared": {"hidden": 8}}},
        "copy",
        ("moe.shared.w_in_PFD", "nothing to make it of"),
    ),
    "feed-forwards tied again": (
        {**DENSE, "untie": {"ffn": True}},
        {"moe": FOUR_EACH},
        "copy",
        ("model.untie.ffn is false", "was true"),
    ),
    "tied again": (
        {**DENSE, "untie": {"qkvo": True}},
        {"moe": TOP_2},
        "copy",
        ("model.untie.qkvo is false", "was true"),
    ),
    "a router that goes on, scored otherwise": (
        {"moe": TOP_2, "dense_layers": [0, 1]},
        {"moe": {**TOP_2, "router": {"k": 2, "score": "sigmoid"}}, "dense_layers": [0]},
        "copy",
        ("router.score is sigmoid", "was softmax", "layer 2 goes on", "set model.moe.router.score"),
    ),
    "a router that goes on, scaled otherwise": (
        {"moe": {**TOP_2, "router": {"k": 2, "scale": 2.5}}, "dense_layers": [0, 1]},
        {"moe": TOP_2, "dense_layers": [0]},
        "copy",
        ("router.scale is 1.0", "was 2.5", "layer 2 goes on"),
    ),
    "a gate less": (
        {"moe": {**TOP_2, "shared": {"hidden": 8}, "shared_gate": True}},
        {"moe": {**TOP_2, "shared": {"hidden": 8}}},
        "copy",
        ("shared_gate_D", "no place for"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_told(case: str, data: Path, tmp_path: Path) -> None:
    before, after, how, needles = REFUSED[case]
    source = save(config_of(data, before), tmp_path / "old")
    with pytest.raises(UserError) as refusal:
        grown(source, config_of(data, after), tmp_path / "new", how)
    assert all(needle in str(refusal.value) for needle in needles), refusal.value
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("train", "needles"),
    [
        ({"seed": 4}, ("train.seed is 4", "was 3")),
        ({"global_batch": 6, "accumulation": 2}, ("global_batch is 6", "after 16 sequences")),
    ],
)
def test_data_that_cannot_go_on_is_told(
    train: dict[str, Any], needles: tuple[str, ...], dense: Any, data: Path, tmp_path: Path
) -> None:
    same = {"steps": 3, "global_batch": 8, "accumulation": 2, "precision": "fp64", "seed": 3}
    new = config_of(data, {"moe": TOP_2}, train={**same, **train})
    with pytest.raises(UserError) as refusal:
        grown(dense[1], new, tmp_path / "new")
    assert all(needle in str(refusal.value) for needle in needles), refusal.value
