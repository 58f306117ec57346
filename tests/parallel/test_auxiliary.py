"""Auxiliary routers are trained alone, with the same numbers in every layout, also after a resume;
with them routing is causal, without them it is not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.launch.config import RunConfig
from coterie.models import Decoder
from coterie.moe.tokens import TokenInfo
from coterie.parallel.trainer import Trainer
from tests.distributed import run_ranks
from tests.parallel.tiny import (
    ALONE,
    VOCABULARY,
    bits_differ,
    decoder_of,
    model_of,
    tiny_config,
    weights,
)
from tests.parallel.whole_runs import Found, check_close, on_ranks, router_config, run

STEPS, HALF = 4, 2
ROUTERS: dict[str, dict[str, Any]] = {
    "modality": {"kind": "modality", "experts": [6, 2]},
    "expert_choice": {"kind": "expert_choice", "capacity_factor": 2},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "shards": {"ep": 2, "dp_shard": 2},
    "pipeline of shards, one stage without experts": {"pp": 2, "dp_shard": 2, "stages": [1, 2]},
    "zbv": {"pp": 2, "vpp": 2, "schedule": "zbv", "stages": [1, 1, 1, 0]},
    "tensor and expert parallel": {"tp": 2, "ep": 2},
    "context parallel": {"cp": 2, "ep": 4},
}
EVALUATED = {
    *(
        f"{way}loss{modality}"
        for way in ("", "non_causal/")
        for modality in ("", "/text", "/image")
    ),
    *(f"auxiliary/{name}" for name in ("cross_entropy", "agreement", "always_no")),
}


def config_of(
    data: Path, router: str, parallel: dict[str, Any] | None = None, auxiliary: bool = True
) -> RunConfig:
    optimizer = {"warmup": 1, "lr": 1e-2, "decay": "linear", "clip": 1e-3}
    settings = {**ROUTERS[router], "auxiliary": auxiliary}
    stage = {"stage": {"weights": "another run"}} if auxiliary else {}
    return router_config(data, settings, STEPS, HALF, parallel, optimizer=optimizer, **stage)


def observe(
    config: RunConfig, trainer: Trainer, folder: Path
) -> tuple[dict[str, float], list[str]]:
    """Held-out figures, and the names of this rank's parameters that training changed."""
    before = weights(trainer.model)
    outcome = trainer.run(folder)
    return outcome.metrics, bits_differ(weights(trainer.model), before)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Found]]:
    """Runs in one process, and their folder."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {
        name: run(config_of(data, name), ALONE, folder / name, observe) for name in ROUTERS
    }


def test_auxiliary_routers_learn_and_all_else_stays(alone: tuple[Path, dict[str, Found]]) -> None:
    for reports, (metrics, changed) in alone[1].values():
        assert changed and all(".router.auxiliary." in name for name in changed)
        losses = [report["router_losses"]["auxiliary"] for report in reports]
        assert losses[-1] < losses[0]
        assert metrics.keys() == EVALUATED


@pytest.mark.parametrize(
    "router", [{"k": 2, "bias_update": 0.1, "jitter": 0.2}, {"kind": "random_fixed", "k": 4}]
)
def test_routers_that_change_themselves_stay_too(
    router: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    tree = config_of(data, "modality").model_dump(mode="json")
    tree["model"]["moe"]["router"] = router
    tree["model"]["mixture_of_depths"] = {"capacity": 0.5, "auxiliary": True}
    reports, (_, changed) = run(RunConfig.model_validate(tree), ALONE, tmp_path, observe)
    assert changed and all(".depths.predictor." in name for name in changed)
    routed = {sum(report["load"][layer]) for report in reports for layer in report["load"]}
    assert min(routed) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_of_one_process(
    layout: str, alone: tuple[Path, dict[str, Found]], data: Path, tmp_path: Path
) -> None:
    folder, truths = alone
    configs = {router: config_of(data, router, LAYOUTS[layout]) for router in truths}
    results = run_ranks(4, on_ranks, configs, observe, tmp_path, folder, ROUTERS, timeout=180)
    for router, (truth, (losses, _)) in truths.items():
        for found in results:
            for ours, right in zip(found[router], (truth, truth[HALF:]), strict=True):
                reports, (metrics, changed) = ours
                check_close(reports, right)
                assert metrics == pytest.approx(losses, rel=1e-9)
                assert all(".router.auxiliary." in name for name in changed)
        assert any(found[router][0][1][1] for found in results)


def _logits(model: Decoder, tokens_BS: Tensor, by_choice: bool) -> Tensor:
    rows = tokens_BS.shape[0]
    info = TokenInfo(
        modality_T=VOCABULARY.modality(tokens_BS).flatten(),
        sequence_T=torch.arange(rows).repeat_interleave(tokens_BS.shape[1]),
        by_choice=by_choice,
    )
    with torch.no_grad():
        return model.eval()(tokens_BS, info).x


@pytest.mark.parametrize("router", ROUTERS)
def test_logits_of_a_prefix_are_those_of_the_whole(router: str, data: Path) -> None:
    """With auxiliary routers; experts that choose see the future."""
    model = model_of(config_of(data, router), ALONE)
    with torch.no_grad():
        for name, parameter in model.named():
            if ".router." in name or name == "embedding.weight":
                parameter.mul_(30)  # choices, and what they do, differ between tokens
    decoder = decoder_of(model)
    gen = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(250, 259, (2, 12), generator=gen)  # bytes and grey levels
    for by_choice in (False, True):
        whole = _logits(decoder, tokens_BS, by_choice)
        worst = max(
            float((_logits(decoder, tokens_BS[:, :n], by_choice) - whole[:, :n]).abs().max())
            for n in range(1, 12)
        )
        assert (worst > 1e-3) if by_choice else (worst < 1e-10)


def test_models_say_whether_they_are_causal(data: Path) -> None:
    for router in ROUTERS:
        with_them = config_of(data, router).model
        assert with_them.causal and with_them.auxiliary
        without = config_of(data, router, auxiliary=False).model
        assert not without.causal and not without.auxiliary
    assert tiny_config(data).model.causal
