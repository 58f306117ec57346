"""A mixture of vector fields trained over ranks: the same numbers in every layout, and as in a loop
written out here."""

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from coterie.data.environments import Environments
from coterie.models.dynamics import DynamicsModel
from coterie.moe.routers.kmeans import KMeansRouter
from coterie.parallel.environments import ExpertGrid, assert_same, expert_grid, gather_rows
from coterie.parallel.mixer import MixerConfig, MixerTrainer
from tests.distributed import RankFailure, run_ranks
from tests.moe.tiny import error, randn
from tests.parallel.tiny_environments import dynamics, linear, purity

QUICK = MixerConfig(
    rounds=3, context_steps=4, model_steps=3, gate_every=2, batch=4, lr=0.05, proximal=10.0
)
CASES = {
    "kmeans": {},
    "split contexts": {"context": 8, "split_contexts": True},
    "coda": {"adaptation": "coda"},
    "gradient gate": {"router": {"kind": "gradient"}},
}
LIMIT = 1e-9


def _data() -> Environments:
    """Ten environments: over four ranks the homes are 3, 3, 3, 1."""
    return linear(2, 5)


def _facts(trainer: MixerTrainer, grid: ExpertGrid) -> dict[str, Any]:
    """All that training decides, whole on every rank."""
    env = trainer.environments
    facts: dict[str, Any] = {
        "contexts": env.context_E,
        "experts of environments": env.expert_E,
        "gate": trainer.model.router.weight.detach(),
        "scores": env.scores(),
        "trajectories": env.trajectories(),
    }
    for name, parameter in trainer.model.experts.named_parameters():
        rank_m = torch.arange(grid.ep.size)
        stacked = parameter.detach().unsqueeze(0)
        facts[name] = gather_rows(stacked, rank_m, grid.ep).flatten(0, 1)
    return facts


def _train(case: str, grid: ExpertGrid) -> dict[str, Any]:
    model = dynamics(**{"experts": 4, "context": 4, "ep": grid.ep, **CASES[case]})
    trainer = MixerTrainer(model, _data(), QUICK, grid)
    facts: dict[str, Any] = {"hosts at first": trainer.environments.host_E}
    facts["losses"] = torch.tensor([trainer.train_round() for _ in range(3)], dtype=torch.float64)
    facts |= _facts(trainer, grid)
    unseen = trainer.adapt(linear(2, 3, seed=9), steps=6)
    facts["adapted"] = unseen.context_E
    facts["adapted to"] = unseen.expert_E
    facts["held out"] = trainer.evaluate(linear(2, 5, seed=0, trajectories=3))
    facts["update"] = trainer.last_update.accuracy
    return facts


def _on_rank(rank: int, ep: int) -> dict[str, dict[str, Any]]:
    grid = expert_grid(ep)
    return {case: _train(case, grid) for case in CASES}


@cache
def _one_process(case: str) -> dict[str, Any]:
    return _train(case, ExpertGrid())


@cache
def _spread(world: int, ep: int) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(world, _on_rank, ep, timeout=200)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), (4, 4), (4, 2), (2, 1)])
def test_every_layout_gives_the_same_numbers(world: int, ep: int, case: str) -> None:
    truth = _one_process(case)
    for rank, results in enumerate(_spread(world, ep)):
        ours = results[case]
        for name in truth.keys() - {"hosts at first"}:
            if not isinstance(truth[name], Tensor):
                assert ours[name] == truth[name] or math.isnan(truth[name]), name
            elif truth[name].dtype == torch.int64:
                assert torch.equal(ours[name], truth[name]), (rank, name)
            else:
                assert error(ours[name], truth[name]) <= LIMIT, (rank, name)


def test_the_case_is_not_trivial() -> None:
    """At first one rank hosts all; later several experts are in use, and everything has moved."""
    assert _spread(4, 4)[0]["kmeans"]["hosts at first"].unique().numel() == 1
    truth = _one_process("kmeans")
    assert truth["experts of environments"].unique().numel() > 1
    assert torch.equal(truth["trajectories"], _data().y_ENTD)  # nothing was dropped
    assert truth["w0"].flatten(1).unique(dim=0).shape[0] > 1  # the experts started identical
    assert (truth["contexts"] != 0).any(1).all()
    assert truth["update"] == 1.0


def _loop_loss(
    model: DynamicsModel, context_ED: Tensor, expert_E: Tensor, data: Environments, batch: list[int]
) -> Tensor:
    """The batch's mean relative error: one trajectory, one time, one stage after the other."""
    p = dict(model.experts.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for e in batch:
        m, xi = int(expert_E[e]), torch.diag(context_ED[e])
        w = [p[f"w{i}"][m] + p[f"into{i}"][m] @ xi @ p[f"from{i}"][m] for i in range(2)]

        def field(y: Tensor, m: int = m, w: list[Tensor] = w) -> Tensor:
            return F.silu(y @ w[0] + p["b0"][m]) @ w[1] + p["b1"][m]

        wrong, size = torch.zeros((), dtype=torch.float64), 0.0
        for y_TD in data.y_ENTD[e]:
            y = y_TD[0]
            for i in range(1, len(data.t_T)):
                h = data.t_T[i] - data.t_T[i - 1]
                a = field(y)
                b = field(y + h / 2 * a)
                c = field(y + h / 2 * b)
                y = y + h / 6 * (a + 2 * b + 2 * c + field(y + h * c))
                wrong = wrong + (y - y_TD[i]).square().sum()
            size += float(y_TD.square().sum())
        total = total + wrong / size
    return total / len(batch)


def test_a_round_is_proximal_alternation_written_out() -> None:
    data = linear(2, 3)
    config = MixerConfig(rounds=9, context_steps=3, model_steps=3, gate_every=99, batch=3, lr=0.05)
    trainer, mirror = (MixerTrainer(dynamics(), data, config) for _ in range(2))
    context_ED = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    first = [p.detach().clone() for p in mirror.model.parameters()]
    contexts = torch.optim.Adam([context_ED], 0.05)
    weights = torch.optim.Adam(mirror.model.parameters(), 0.05)
    expert_E = mirror.model.router.experts_of(context_ED)
    for index in range(6):
        gen_batch = mirror.batch().nonzero()[:, 0].tolist()
        loss = _loop_loss(mirror.model, context_ED, expert_E, data, gen_batch)
        if index < 3:
            loss = loss + 10 / 2 * context_ED.square().mean()  # from 0
        else:
            change = [
                (p - q).flatten() for p, q in zip(mirror.model.parameters(), first, strict=True)
            ]
            loss = loss + 10 / 2 * torch.cat(change).square().mean()
        chosen = contexts if index < 3 else weights
        contexts.zero_grad()
        weights.zero_grad()
        loss.backward()
        chosen.step()
        mirror.environments.set_contexts(context_ED.detach())
        mirror.step += 1
    trainer.train_round()
    assert float((trainer.environments.context_E - context_ED.detach()).abs().max()) < 1e-11
    pairs = zip(trainer.model.parameters(), mirror.model.parameters(), strict=True)
    assert max(float((p - q).detach().abs().max()) for p, q in pairs) < 1e-11


def test_the_proximal_term_holds_back() -> None:
    moved = []
    for proximal in (0.0, 1e4):
        config = QUICK.model_copy(update={"proximal": proximal, "gate_every": 99})
        trainer = MixerTrainer(dynamics(), linear(), config)
        trainer.train_round()
        moved.append(float(trainer.environments.context_E.abs().mean()))
    assert moved[1] < moved[0] / 2


def test_the_experts_rate_decays_after_each_third() -> None:
    config = MixerConfig(rounds=6, context_steps=1, model_steps=1, lr=0.01, batch=2)
    trainer = MixerTrainer(dynamics(), linear(), config)
    rates = []
    for _ in range(7):  # one more than planned
        trainer.train_round()
        rates.append(trainer._model_optimizer.param_groups[0]["lr"])
        assert trainer._context_optimizer.param_groups[0]["lr"] == 0.01
    assert rates == pytest.approx([0.01, 0.01, 0.004, 0.004, 0.0016, 0.0016, 0.0016])


def test_a_batch_is_an_environment_and_its_nearest_by_l1() -> None:
    trainer = MixerTrainer(dynamics(), linear(2, 3), QUICK.model_copy(update={"batch": 3}))
    context_E = torch.zeros(6, 4, dtype=torch.float64)
    context_E[:, 0] = torch.tensor([0.0, 10.0, 0.2, 10.1, 0.1, 10.3])
    context_E[5, 0], context_E[5, 1:] = 10.0, 0.2  # L2 would call it near enough: 0.35 of 0.6
    trainer.environments.set_contexts(context_E)
    seen = set()
    for step in range(30):
        trainer.step = step
        seen.add(tuple(trainer.batch().nonzero()[:, 0].tolist()))
    assert seen == {(0, 2, 4), (1, 3, 5)}


def test_equal_contexts_do_not_push_the_drawn_environment_out() -> None:
    trainer = MixerTrainer(dynamics(), linear(2, 3), QUICK.model_copy(update={"batch": 1}))
    seen = set()
    for step in range(60):
        trainer.step = step
        seen |= set(trainer.batch().nonzero()[:, 0].tolist())
    assert seen == set(range(6))


def test_equal_contexts_join_whatever_their_place_in_the_data() -> None:
    """At first all are equal: were ties broken by order, a family that stands first would be in
    every batch, and so be told."""
    trainer = MixerTrainer(dynamics(), linear(2, 5), QUICK.model_copy(update={"batch": 5}))
    times_E = torch.zeros(10)
    for step in range(400):
        trainer.step = step
        batch_E = trainer.batch()
        assert batch_E.sum() == 5
        times_E += batch_E
    assert times_E.min() > 160 and times_E.max() < 240  # 200 ± 4 standard deviations


def test_environments_migrate_at_gate_updates_only() -> None:
    config = QUICK.model_copy(update={"gate_every": 7, "lr": 0.2})
    trainer = MixerTrainer(dynamics(4), linear(4, 3), config)
    env = trainer.environments
    changes = []
    for _ in range(3):
        before = env.expert_E
        for kind in range(7):
            batch_E = trainer.batch()
            trainer._context_step(batch_E, env.context_H.detach().clone())
            trainer.step += 1
            assert torch.equal(env.expert_E, before), kind
        trainer.update_gate()
        changes.append(not torch.equal(env.expert_E, before))
    assert any(changes)


def test_a_gate_trained_by_gradient_is_asked_after_every_step() -> None:
    config = QUICK.model_copy(update={"gate_every": 99, "lr": 0.3})
    trainer = MixerTrainer(dynamics(4, router={"kind": "gradient"}), linear(4, 3), config)
    env, seen = trainer.environments, set()
    env.set_contexts(randn(12, 4, seed=1))
    for _ in range(3):
        trainer.train_round()
        assert torch.equal(env.expert_E, trainer.model.router.experts_of(env.context_E))
        seen.add(tuple(env.expert_E.tolist()))
    assert len(seen) > 1


@pytest.mark.parametrize("seed", [1, 2])
def test_planted_families_are_recovered_by_training(seed: int) -> None:
    """From contexts at 0 and experts that are all alike."""
    data = linear(3, 4, seed=seed, trajectories=4)
    config = MixerConfig(
        rounds=24, context_steps=6, model_steps=6, gate_every=3, batch=4, lr=0.02, seed=seed
    )
    trainer = MixerTrainer(dynamics(3, 4, seed=seed, hidden=8), data, config)
    assert purity(trainer.environments.expert_E, data.family_E) < 1.0
    losses = [trainer.train_round() for _ in range(12)]
    assert purity(trainer.environments.expert_E, data.family_E) == 1.0
    assert trainer.last_update.accuracy == 1.0
    assert losses[-1] < losses[0] / 4


def _fitted() -> MixerTrainer:
    """Two families whose contexts, gate and experts fit."""
    data = linear(2, 4)
    config = MixerConfig(context_steps=10, model_steps=20, gate_every=99, batch=8, lr=0.02)
    trainer = MixerTrainer(dynamics(), data, config)
    sign_E = 2.0 * data.family_E.double()[:, None] - 1
    trainer.environments.set_contexts(0.5 * sign_E.expand(-1, 4))
    trainer.update_gate()
    for _ in range(6):
        trainer.train_round()
    trainer.update_gate()
    assert purity(trainer.environments.expert_E, data.family_E) == 1.0
    return trainer


def test_adaptation_starts_at_zero_in_one_expert_and_can_stay_there() -> None:
    trainer, unseen = _fitted(), linear(2, 3, seed=5, spread=0.1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    gate = trainer.model.router.weight.clone()
    start = trainer.adapt(unseen, steps=0)
    assert not start.context_E.any()
    assert start.expert_E.unique().numel() == 1
    locked = trainer.adapt(unseen, steps=2)
    assert purity(locked.expert_E, unseen.family_E) < 1.0

    config = trainer.config.model_copy(update={"adaptation_start": "centroid"})
    trainer.config = config
    free = trainer.adapt(unseen, steps=2)
    assert purity(free.expert_E, unseen.family_E) == 1.0
    assert free.all_losses().max() < locked.all_losses().max()
    adapted = trainer.adapt(unseen, steps=30)
    assert adapted.all_losses().mean() < free.all_losses().mean()

    for parameter, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert torch.equal(trainer.model.router.weight, gate)


def test_a_centroid_start_needs_centroids() -> None:
    config = QUICK.model_copy(update={"adaptation_start": "centroid"})
    trainer = MixerTrainer(dynamics(), linear(), config)
    with pytest.raises(ValueError, match="K-means gate that has converged"):
        trainer.adapt(linear(seed=3), steps=1)


def test_a_centroid_start_outlasts_a_failed_update() -> None:
    trainer, unseen = _fitted(), linear(2, 3, seed=5, spread=0.1)
    trainer.config = trainer.config.model_copy(update={"adaptation_start": "centroid"})
    before = trainer.adapt(unseen, steps=0)
    context_E = trainer.environments.context_E
    trainer.environments.set_contexts(torch.zeros_like(context_E))
    trainer.update_gate()
    assert trainer.last_update.reason == "a cluster is empty"
    router = trainer.model.router
    assert isinstance(router, KMeansRouter) and not router.warm and router.fitted
    after = trainer.adapt(unseen, steps=0)
    assert torch.equal(after.context_E, before.context_E)
    assert torch.equal(after.expert_E, before.expert_E)


def test_a_failed_update_changes_nothing_and_training_goes_on() -> None:
    model = dynamics(2, 4, router={"kind": "kmeans", "start": "origin"})
    trainer = MixerTrainer(model, linear(), QUICK)
    before = model.router.weight.clone()
    trainer.update_gate()  # all contexts are 0: one cluster takes them all
    assert trainer.last_update.reason == "a cluster is empty"
    assert torch.equal(model.router.weight, before)
    assert math.isfinite(trainer.train_round())


def test_one_expert_is_the_plain_method() -> None:
    trainer = MixerTrainer(dynamics(1, 2), linear(), QUICK)
    losses = [trainer.train_round() for _ in range(3)]
    assert trainer.environments.expert_E.eq(0).all()
    assert losses[-1] < losses[0]


def _drifted(rank: int) -> None:
    grid = expert_grid(2)
    trainer = MixerTrainer(dynamics(ep=grid.ep), linear(), QUICK, grid)
    if rank == 1:
        trainer.environments.context_E[0, 0] += 1e-12
    trainer.update_gate()


def test_replicas_that_drifted_apart_are_named() -> None:
    with pytest.raises(RankFailure, match=r"contexts and losses .* of ranks \[1\] differ"):
        run_ranks(2, _drifted)


def _gate_drifted(rank: int) -> None:
    grid = expert_grid(2)
    router = KMeansRouter(4, 2, dynamics().config.router)  # type: ignore[arg-type]
    router.weight[0, 0] += rank
    assert_same("the gate's weights", grid.world, router.weight)


def test_gates_that_differ_are_named() -> None:
    with pytest.raises(RankFailure, match=r"gate's weights of ranks \[1\] differ"):
        run_ranks(2, _gate_drifted)


def _replica_gradients(rank: int) -> list[bool]:
    """On 2 × 2 ranks: are the weights of the same expert equal on its replicas, and only there?"""
    grid = expert_grid(2)
    trainer = MixerTrainer(dynamics(ep=grid.ep), _data(), QUICK, grid)
    for _ in range(3):
        trainer.train_round()
    w = next(trainer.model.experts.parameters()).detach()
    parts = [torch.empty_like(w) for _ in range(4)]
    dist.all_gather(parts, w)
    alike = [torch.equal(parts[0], parts[2]), torch.equal(parts[1], parts[3])]
    return [*alike, not torch.equal(parts[0], parts[1])]


def test_gradients_are_summed_over_replicas_alone() -> None:
    assert run_ranks(4, _replica_gradients) == [[True] * 3] * 4
