"""Mixture of depths against plain loops over tokens, and what it promises."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from coterie.models.config import DecoderConfig
from coterie.models.decoder import Block, Decoder
from coterie.models.depths import MixtureOfDepthsConfig
from coterie.models.placement import boxes_of, parameter_counts
from coterie.moe.tokens import TokenInfo
from tests.models.tiny_decoder import config, decoder, tokens
from tests.moe.tiny import error, randn

B, S, WIDTH, HEADS, K = 3, 11, 16, 4, 2
DEPTHS: dict[str, Any] = {"capacity": 0.4, "every": 2, "first": 0}
SETTINGS: dict[str, Any] = {
    "attention": {"heads": HEADS, "kv_heads": HEADS, "within_documents": True},
    "moe": {"experts": {"count": 4, "hidden": 6}, "router": {"k": K}},
}
ROW_B = torch.arange(B).repeat_interleave(S)
PADDING_BS = torch.arange(S) >= torch.tensor([S, 8, 1])[:, None]
DOCUMENT_BS = (torch.arange(S) >= torch.tensor([5, 3, 4])[:, None]).long()
INFO = TokenInfo(
    sequence_T=ROW_B,
    position_T=torch.arange(S).repeat(B),
    padding_T=PADDING_BS.flatten(),
    document_T=DOCUMENT_BS.flatten(),
)


def model(
    depths: dict[str, Any] | None = None, recompute: Any = "none", **settings: Any
) -> Decoder:
    tree = SETTINGS | settings | {"mixture_of_depths": DEPTHS | (depths or {})}
    built = decoder(config(**tree), recompute=recompute)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("depths.weight_D"):  # no saturated score, no tie
                parameter.copy_(randn(WIDTH, seed=len(name)) * 0.3)
    return built


def block_of(model: Decoder, layer: int) -> Block:
    block = model.blocks[str(layer)]
    assert isinstance(block, Block)
    return block


def normed(x_D: Tensor, weight_D: Tensor) -> Tensor:
    return x_D / (x_D.square().mean() + 1e-6).sqrt() * weight_D


def turned(x_d: Tensor, position: int) -> Tensor:
    """A head's vector in its planes (d, d + half), each turned by position · θ^(-2d / width)."""
    out_d, half = x_d.clone(), len(x_d) // 2
    for plane in range(half):
        angle = torch.tensor(position * 10_000.0 ** (-2 * plane / len(x_d)), dtype=torch.float64)
        a, b = x_d[plane], x_d[plane + half]
        out_d[plane] = a * angle.cos() - b * angle.sin()
        out_d[plane + half] = b * angle.cos() + a * angle.sin()
    return out_d


def swiglu(w_in_PFD: Tensor, w_out_FD: Tensor, x_D: Tensor) -> Tensor:
    gate, up = w_in_PFD @ x_D
    return (torch.nn.functional.silu(gate) * up) @ w_out_FD


def layers_by_loops(block: Block, x: dict[int, Tensor], document_S: Tensor) -> dict[int, Tensor]:
    """The block's layers over the tokens ``x``, by their positions."""
    attention, out = block.attention, {}
    n = {place: normed(x_D, block.attention_norm.weight) for place, x_D in x.items()}
    heads = (HEADS, -1)
    for place, x_D in x.items():
        seen = [p for p in x if p <= place and document_S[p] == document_S[place]]
        joined = []
        for head in range(HEADS):
            q_d = turned((attention.q.weight @ n[place]).view(heads)[head], place)
            k_d = [turned((attention.k.weight @ n[p]).view(heads)[head], p) for p in seen]
            v_d = [(attention.v.weight @ n[p]).view(heads)[head] for p in seen]
            logits = torch.stack([q_d @ k for k in k_d]) / len(q_d) ** 0.5
            joined.append(sum(w * v for w, v in zip(logits.softmax(0), v_d, strict=True)))
        y_D = x_D + attention.out.weight @ torch.cat(joined)
        z_D = normed(y_D, block.feed_forward_norm.weight)
        if block.feed_forward is not None:
            f = block.feed_forward
            out[place] = y_D + swiglu(f.w_in_PFD, f.w_out_FD, z_D)
            continue
        assert block.moe is not None
        score_E = (block.moe.router.weight @ z_D).softmax(-1)
        chosen = score_E.topk(K).indices.tolist()
        experts = block.moe.experts
        for expert in chosen:
            weight = score_E[expert] / score_E[chosen].sum()
            y_D = y_D + weight * swiglu(experts.w_in_EPFD[expert], experts.w_out_EFD[expert], z_D)
        out[place] = y_D
    return out


def by_loops(
    block: Block, x_BSD: Tensor, capacity: float, score: str
) -> tuple[Tensor, list[list[int]]]:
    """The block, and the positions of each sequence that pass it."""
    assert block.depths is not None
    rows, passing = [], []
    for row in range(B):
        r = {p: x_BSD[row, p] @ block.depths.weight_D for p in range(S) if not PADDING_BS[row, p]}
        take = max(1, int(capacity * len(r)))
        chosen = sorted(sorted(r, key=lambda p: -float(r[p].detach()))[:take])
        y = layers_by_loops(block, {p: x_BSD[row, p] for p in chosen}, DOCUMENT_BS[row])
        out = list(x_BSD[row].unbind(0))
        for p in chosen:
            gate = r[p].sigmoid() if score == "sigmoid" else r[p]
            out[p] = x_BSD[row, p] + gate * (y[p] - x_BSD[row, p])
        rows.append(torch.stack(out))
        passing.append(chosen)
    return torch.stack(rows), passing


@pytest.mark.parametrize("score", ["sigmoid", "linear"])
@pytest.mark.parametrize("layer", [0, 2])  # dense, experts
def test_a_block_by_loops(layer: int, score: str) -> None:
    block = block_of(model({"score": score}), layer).train()
    x_BSD = randn(B, S, WIDTH, seed=1).requires_grad_()
    ours, losses, stats, *_ = block(x_BSD, INFO, DOCUMENT_BS)
    right, passing = by_loops(block, x_BSD, DEPTHS["capacity"], score)
    assert [len(chosen) for chosen in passing] == [4, 3, 1]
    assert error(ours, right) < 1e-13
    leaves = [x_BSD, *block.parameters()]
    dy_BSD = randn(B, S, WIDTH, seed=2)
    mine = torch.autograd.grad(ours, leaves, dy_BSD)
    for gradient, true in zip(mine, torch.autograd.grad(right, leaves, dy_BSD), strict=True):
        assert error(gradient, true) < 1e-11
    skipped_BS = torch.ones(B, S, dtype=torch.bool)
    for row, chosen in enumerate(passing):
        skipped_BS[row, chosen] = False
    assert torch.equal(ours[skipped_BS], x_BSD[skipped_BS])  # to the bit
    assert not (ours == x_BSD).all(-1)[~skipped_BS].any()
    if layer:
        assert stats is not None and losses.keys() == {"balance", "z"}
        assert int(stats.tokens) == 8 and int(stats.load_E.sum()) == 8 * K


def test_gradients_by_finite_differences() -> None:
    block = block_of(model({"score": "linear"}), 2)
    x_BSD = randn(B, S, WIDTH, seed=1).requires_grad_()
    assert block.depths is not None

    def run(x_BSD: Tensor, weight_D: Tensor) -> Tensor:
        with torch.no_grad():
            block.depths.weight_D.copy_(weight_D)
        return block(x_BSD, INFO, DOCUMENT_BS)[0]

    direction, dy = randn(B, S, WIDTH, seed=3), randn(B, S, WIDTH, seed=4)
    weight_D = block.depths.weight_D.detach().clone()
    run(x_BSD, weight_D).backward(dy)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (run(x_BSD + sign * step * direction, weight_D) for sign in (1, -1))
        slope = float(((ahead - behind) * dy).sum() / (2 * step))
        assert x_BSD.grad is not None
        assert float((x_BSD.grad * direction).sum()) == pytest.approx(slope, rel=1e-6)
        ahead, behind = (run(x_BSD, weight_D + sign * step * direction[0, 0]) for sign in (1, -1))
        slope = float(((ahead - behind) * dy).sum() / (2 * step))
        gradient_D = block.depths.weight_D.grad
        assert gradient_D is not None and abs(slope) > 1e-3
        assert float((gradient_D * direction[0, 0]).sum()) == pytest.approx(slope, rel=1e-6)


def passed(block: Block, x_BSD: Tensor, info: TokenInfo = INFO) -> Tensor:
    """bool (B, S): the tokens that the block changes."""
    return (block(x_BSD, info)[0] != x_BSD).any(-1)


@pytest.mark.parametrize("capacity", [0.05, 0.1, 0.25, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_capacity_is_of_real_tokens_and_at_least_one(capacity: float) -> None:
    block = block_of(model({"capacity": capacity}), 2)
    passed_BS = passed(block, randn(B, S, WIDTH, seed=5))
    expected = [max(1, int(capacity * real)) for real in (11, 8, 1)]
    assert passed_BS.sum(1).tolist() == expected
    assert not passed_BS[PADDING_BS].any()
    longer = [randn(1, 30, WIDTH, seed=n) for n in range(2)]
    for x_BSD in longer:  # .1 · 30 = 3.0000000000000004, .7 · 30 = 20.999999999999996
        assert int(passed(block, x_BSD, TokenInfo()).sum()) == max(1, round(capacity * 3000) // 100)


def test_padding_changes_nothing() -> None:
    """Neither what it holds nor how much of it there is."""
    block = block_of(model(), 2)
    x_BSD = randn(B, S, WIDTH, seed=6)
    y_BSD = block(x_BSD, INFO, DOCUMENT_BS)[0]
    other_BSD = torch.where(PADDING_BS[..., None], 100 * randn(B, S, WIDTH, seed=7), x_BSD)
    z_BSD = block(other_BSD, INFO, DOCUMENT_BS)[0]
    assert error(z_BSD[~PADDING_BS], y_BSD[~PADDING_BS]) < 1e-14
    assert torch.equal(z_BSD[PADDING_BS], other_BSD[PADDING_BS])
    short = replace(INFO, **{n: v.view(B, S)[1:, :8].flatten() for n, v in facts(INFO).items()})
    short = replace(short, sequence_T=torch.arange(2).repeat_interleave(8))
    w_BSD = block(x_BSD[1:, :8], short, DOCUMENT_BS[1:, :8])[0]
    assert error(w_BSD, y_BSD[1:, :8]) < 1e-14


def facts(info: TokenInfo) -> dict[str, Tensor]:
    return {name: value for name, value in vars(info).items() if isinstance(value, Tensor)}


def test_sequences_do_not_compete() -> None:
    block = block_of(model(), 2)
    x_BSD = randn(B, S, WIDTH, seed=8)
    order_B = torch.tensor([2, 0, 1])
    swapped = INFO.map(lambda fact: fact.view(B, S)[order_B].flatten())
    swapped = replace(swapped, sequence_T=ROW_B)
    y_BSD = block(x_BSD, INFO, DOCUMENT_BS)[0]
    z_BSD = block(x_BSD[order_B], swapped, DOCUMENT_BS[order_B])[0]
    assert error(z_BSD, y_BSD[order_B]) < 1e-13
    stronger_BSD = x_BSD.clone()
    stronger_BSD[0] *= 10
    assert error(block(stronger_BSD, INFO, DOCUMENT_BS)[0][1:], y_BSD[1:]) < 1e-14


def test_tokens_keep_their_positions() -> None:
    """The result is not that of the same tokens side by side, unless they stand so."""
    block = block_of(model(), 2)
    x_BSD = randn(1, S, WIDTH, seed=9)
    y_BSD = block(x_BSD, TokenInfo())[0]
    (chosen,) = ((y_BSD != x_BSD).any(-1)).nonzero(as_tuple=True)[1:]
    assert len(chosen) == 4 and int(chosen[-1] - chosen[0]) > 3
    inner = block._layers(x_BSD[:, chosen], TokenInfo(), None, None)[0]
    gate_S1 = (x_BSD[0, chosen] @ block.depths.weight_D).sigmoid()[:, None]
    side_by_side = x_BSD[0, chosen] + gate_S1 * (inner[0] - x_BSD[0, chosen])
    assert error(y_BSD[0, chosen], side_by_side) > 1e-3
    first_SD = y_BSD[0, chosen[0]]
    assert error(first_SD, side_by_side[0]) < 1e-13  # the first sees itself alone


def test_all_tokens_and_gate_one_are_the_plain_block() -> None:
    ours = block_of(model({"capacity": 1.0, "score": "linear"}), 2)
    plain = block_of(decoder(config(**SETTINGS)), 2)
    assert ours.depths is not None and plain.depths is None
    x_BSD = randn(B, S, WIDTH, seed=10)
    x_BSD[..., 0] = 1.0
    with torch.no_grad():  # r = 1 for every token
        ours.depths.weight_D.zero_()[0] = 1.0
    results = [block(x_BSD, INFO, DOCUMENT_BS)[0][~PADDING_BS] for block in (ours, plain)]
    assert error(*results) < 1e-13


def test_the_layers_see_the_facts_of_the_tokens_that_pass() -> None:
    block = block_of(model(), 2)
    number_T = torch.arange(B * S)
    info = replace(INFO, key_T=number_T + 7, token_T=number_T + 5, modality_T=number_T + 3)
    seen: list[TokenInfo] = []
    layers = block._layers

    def watched(x: Tensor, info: TokenInfo, *rest: Any) -> Any:
        seen.append(info)
        return layers(x, info, *rest)

    block._layers = watched  # type: ignore[method-assign]
    passed_BS = passed(block, randn(B, S, WIDTH, seed=11), info)
    (inside,) = seen
    real_T = ~inside.padding_T
    for name, fact in facts(info).items():
        if name != "padding_T":
            assert torch.equal(facts(inside)[name][real_T], fact[passed_BS.flatten()]), name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_has_the_same_numbers(recompute: Any) -> None:
    results = []
    for how in ("none", recompute):
        built = model({"predictor": True}, how).train()
        out = built(tokens(B, S), INFO)
        assert out.losses.keys() == {"balance", "z", "depth_predictor"}
        (out.x.square().mean() + sum(out.losses.values())).backward()
        results.append((out.x, {n: p.grad for n, p in built.named_parameters()}))
    (x, gradients), (again, others) = results
    assert error(again, x) < 1e-13
    for name, gradient in gradients.items():
        assert gradient is not None and others[name] is not None, name
        assert error(others[name], gradient) < 1e-12, name


def test_the_predictor_learns_alone() -> None:
    """Its loss, by hand, reaches nothing else, and nothing else reaches it."""
    built = model({"predictor": True}).train()
    out = built(tokens(B, S), INFO)
    assert out.losses["depth_predictor"].requires_grad
    out.losses["depth_predictor"].backward()
    for name, parameter in built.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (
            ".predictor." in name
        ), name
    block = block_of(built, 2)
    assert block.depths is not None and block.depths.predictor is not None
    x_BSD = randn(B, S, WIDTH, seed=12)
    _, losses, *_ = block(x_BSD, INFO)
    _, passing = by_loops(block, x_BSD, DEPTHS["capacity"], "sigmoid")
    inner, outer = block.depths.predictor.w_in, block.depths.predictor.w_out
    assert inner.shape == (WIDTH // 2, WIDTH)
    each = []
    for row in range(B):
        for p in range(S):
            if not PADDING_BS[row, p]:
                hidden = inner @ x_BSD[row, p]
                yes = (outer @ (hidden * hidden.sigmoid())).sigmoid()
                each.append(-(yes if p in passing[row] else 1 - yes).log())
    assert error(losses["depth_predictor"], torch.cat(each).mean()) < 1e-13


def test_a_trained_predictor_agrees_with_the_highest_scores() -> None:
    built = model({"predictor": True, "capacity": 0.25}, layers=1, dense_layers=[0])
    block = block_of(built, 0)
    assert block.depths is not None and block.depths.predictor is not None
    predictor = list(block.depths.predictor.parameters())
    optimizer = torch.optim.Adam(predictor, lr=0.03)
    for step in range(60):
        losses = block.train()(randn(4, 64, WIDTH, seed=100 + step), TokenInfo())[1]
        optimizer.zero_grad()
        losses["depth_predictor"].backward()
        optimizer.step()
    x_BSD = randn(8, 64, WIDTH, seed=7)
    agreement = (
        (passed(block.train(), x_BSD, TokenInfo()) == passed(block.eval(), x_BSD, TokenInfo()))
        .double()
        .mean()
    )
    # always "no": .75; the least score that passes differs from sequence to sequence
    assert float(agreement) > 0.85


def test_with_a_predictor_a_prefix_has_the_numbers_of_the_whole() -> None:
    for predictor in (True, False):
        built = model({"predictor": predictor}).eval()
        whole = built(tokens(1, S), TokenInfo()).x
        errors = [
            error(built(tokens(1, S)[:, :end], TokenInfo()).x, whole[:, :end])
            for end in range(1, S)
        ]
        assert max(errors) < 1e-12 if predictor else max(errors) > 1e-3
        assert built.train()(tokens(1, S), TokenInfo()).x.shape == whole.shape


def test_in_evaluation_as_many_pass_as_the_predictor_says() -> None:
    block = block_of(model({"predictor": True}), 2).eval()
    assert block.depths is not None and block.depths.predictor is not None
    x_BSD = randn(B, S, WIDTH, seed=13)
    expected_BS = (block.depths.predictor(x_BSD)[..., 0] > 0) & ~PADDING_BS
    y_BSD, losses, stats, *_ = block(x_BSD, INFO, DOCUMENT_BS)
    assert torch.equal((y_BSD != x_BSD).any(-1), expected_BS) and bool(expected_BS.any())
    assert len(set(expected_BS.sum(1).tolist())) == B  # a number of its own for each sequence
    assert int(stats.tokens) == int(expected_BS.sum()) and "depth_predictor" not in losses
    for row in range(B):  # a sequence alone has the same numbers
        y_SD, *_ = block(
            x_BSD[row : row + 1], TokenInfo(padding_T=PADDING_BS[row]), DOCUMENT_BS[row : row + 1]
        )
        assert error(y_SD[0], y_BSD[row]) < 1e-13
    with torch.no_grad():
        block.depths.predictor.w_out.zero_()  # nobody
    assert torch.equal(block(x_BSD, INFO, DOCUMENT_BS)[0], x_BSD)


@pytest.mark.parametrize("layer", [0, 2])
def test_evaluation_by_choice_counts_how_well_it_is_foreseen(layer: int) -> None:
    block = block_of(model({"predictor": True}), layer)
    assert block.depths is not None and block.depths.predictor is not None
    x_BSD = randn(B, S, WIDTH, seed=14)
    chosen = block.train()(x_BSD, INFO, DOCUMENT_BS)
    foreseen = block.eval()(x_BSD, INFO, DOCUMENT_BS)
    by_choice = block(x_BSD, replace(INFO, by_choice=True), DOCUMENT_BS)
    assert torch.equal(by_choice[0], chosen[0]) and not torch.equal(foreseen[0], chosen[0])
    assert foreseen.foresight == chosen.foresight == ()
    assert (by_choice.stats is None) == (block.moe is None)  # a dense layer has nothing to count
    (seen,) = by_choice.foresight
    pairs, right, members, cross_entropy = seen.tolist()
    yes_BS, passed_BS = (foreseen[0] != x_BSD).any(-1), (chosen[0] != x_BSD).any(-1)
    assert pairs == int((~PADDING_BS).sum()) and members == int(passed_BS.sum())
    assert right == int((yes_BS == passed_BS)[~PADDING_BS].sum()) < pairs
    assert cross_entropy / pairs == pytest.approx(float(chosen[1]["depth_predictor"]), rel=1e-12)


def test_every_choice_that_is_foreseen_is_told_once() -> None:
    """Of blocks (0 and 2), and of the experts in mixtures (1 and 2), which see who passes."""
    chosen = {"experts": {"count": 4, "hidden": 6}, "router": {"kind": "expert_choice"}}
    chosen["router"]["auxiliary"] = True
    built = model({"auxiliary": True, "capacity": 0.25}, moe=chosen).eval()
    assert built(tokens(B, S), INFO).foresight == ()
    out = built(tokens(B, S), replace(INFO, by_choice=True))
    real, passing = int((~PADDING_BS).sum()), int(out.stats[2].tokens)
    assert 0 < passing < real and out.stats.keys() == {1, 2}
    pairs = [int(seen[0]) for seen in out.foresight]
    assert pairs == [real, 4 * real, 4 * passing, real]


def test_a_second_stage_trains_the_predictor_alone() -> None:
    first = model()
    second = model({"auxiliary": True}).train()
    names = {n for n, p in second.named_parameters() if p.requires_grad}
    assert names == {f"blocks.{n}.depths.predictor.{w}" for n in (0, 2) for w in ("w_in", "w_out")}
    weights = dict(second.named_parameters())
    for name, parameter in first.named_parameters():  # another stage, the same other weights
        assert torch.equal(weights[name], parameter), name
    out = second(tokens(B, S), INFO)
    assert torch.equal(out.x, first.train()(tokens(B, S), INFO).x)
    out.losses["depth_predictor"].backward()
    assert {n for n, p in weights.items() if p.grad is not None} == names


def test_who_is_causal() -> None:
    def config_of(depths: dict[str, Any] | None, **router: Any) -> DecoderConfig:
        moe = {"experts": {"count": 4, "hidden": 6}, "router": router}
        return config(**SETTINGS | {"moe": moe, "mixture_of_depths": depths})

    chosen = {"kind": "expert_choice"}
    assert config_of(None).causal and not config_of(None).foresees
    assert not config_of({}).causal
    for kind in ("predictor", "auxiliary"):
        settings = config_of({kind: True})
        assert settings.causal and settings.foresees
        assert settings.auxiliary == (kind == "auxiliary")
        assert settings.loss_names[-1] == "depth_predictor"
        assert not config_of({kind: True}, **chosen).causal
        assert config_of({kind: True}, **chosen, auxiliary=True).causal
    assert not config_of({}, **chosen, auxiliary=True).causal


def test_no_rows() -> None:
    """A rank may have no sequences, in training and in evaluation."""
    built = model({"predictor": True}, attention={"heads": HEADS})
    for training in (True, False):
        empty = INFO.map(lambda fact: fact[:0])
        assert built.train(training)(tokens(0, S), empty).x.shape[:2] == (0, S)


def test_which_blocks() -> None:
    names = {name.split(".")[1] for name, _ in model().named_parameters() if ".depths." in name}
    assert names == {"0", "2"}
    depths = MixtureOfDepthsConfig(every=3, first=1)
    assert [layer for layer in range(8) if depths.chooses(layer)] == [1, 4, 7]


def test_shared_depth_has_routers_of_its_own() -> None:
    built = model({"every": 1}, layers=4, dense_layers=[], shared_depth=2)
    names = [n for n, _ in built.named_parameters() if n.endswith("depths.weight_D")]
    assert len(names) == 4 and set(names) <= boxes_of(built).keys()


def test_a_token_passes_a_part_of_the_parameters() -> None:
    settings = SETTINGS | {"mixture_of_depths": DEPTHS | {"first": 1}}
    built = Decoder(config(**settings))
    total, active = parameter_counts(config(**settings))
    assert total == sum(p.numel() for p in built.parameters())
    plain_total, plain = parameter_counts(config(**SETTINGS))
    assert total == plain_total + WIDTH
    block = sum(p.numel() for p in built.blocks["1"].parameters()) - WIDTH
    experts = 4 * 3 * 6 * WIDTH
    used = block - experts + experts * K // 4
    assert active == plain + WIDTH - round(0.6 * used)


def test_capacity_that_would_depend_on_later_tokens() -> None:
    def changed(depths: dict[str, Any]) -> dict[str, Any]:
        tree = config().model_dump(mode="json")
        tree["moe"]["router"] = {"kind": "top_k", "k": 1, "capacity_factor": 1.0}
        return {**tree, "mixture_of_depths": depths}

    DecoderConfig.model_validate(changed({}))  # not causal anyway
    for name in ("predictor", "auxiliary"):
        with pytest.raises(ValidationError, match=r"capacity_factor is 1, but with mixture_of_dep"):
            DecoderConfig.model_validate(changed({name: True}))


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ({"capacity": 0}, "greater than 0"),
        ({"capacity": 1.5}, "less than or equal to 1"),
        ({"first": 3}, "mixture_of_depths.first is 3, but layers are 0 to 2"),
    ],
)
def test_what_cannot_be(depths: dict[str, Any], message: str) -> None:
    tree = {**config().model_dump(), "mixture_of_depths": depths}
    with pytest.raises(ValidationError, match=message):
        DecoderConfig.model_validate(tree)
