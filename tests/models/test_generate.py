"""Generation: a continuation depends on its prompt, its number and the seed, on nothing else."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.comm.axis import expert_parallel
from coterie.models.decoder import Decoder
from coterie.models.generate import Logits, generate
from coterie.moe.tokens import TokenInfo
from tests.distributed import run_ranks
from tests.models.tiny_decoder import VOCABULARY, config, decoder, tokens

LENGTH = 9
NO_STOP: list[int] = []


def logits(model: Decoder) -> Logits:
    return lambda tokens_BS, info: model(tokens_BS, info).x


def _prompts(count: int = 4) -> list[Tensor]:
    """Of lengths 3, 8, 1, 6, …"""
    return [tokens(1, 1 + (2 + 5 * n) % 11, seed=n)[0] for n in range(count)]


def _lists(continuations: list[Tensor]) -> list[list[int]]:
    return [continuation.tolist() for continuation in continuations]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder(config()).eval()


@pytest.mark.parametrize("router", [{}, {"capacity_factor": 0.8}], ids=str)
def test_a_prompt_continues_the_same_alone_and_in_company(router: dict[str, Any]) -> None:
    model = decoder(config(router))
    prompts = _prompts()
    settings: dict[str, Any] = {"stop": [0], "length": LENGTH, "temperature": 1.0, "seed": 5}
    together = _lists(generate(logits(model), prompts, range(4), **settings))
    alone = [
        _lists(generate(logits(model), [p], [n], **settings))[0] for n, p in enumerate(prompts)
    ]
    backwards = _lists(generate(logits(model), prompts[::-1], [3, 2, 1, 0], **settings))
    assert together == alone == backwards[::-1]
    assert len({len(own) for own in together}) > 1  # some stop before others


def test_temperature_zero_takes_the_most_likely(model: Decoder) -> None:
    for prompt, continuation in zip(
        _prompts(),
        generate(logits(model), _prompts(), range(4), stop=NO_STOP, length=LENGTH, temperature=0),
        strict=True,
    ):
        seen = prompt
        for _ in range(LENGTH):
            seen = torch.cat([seen, model(seen[None]).x[0, -1:].argmax(-1)])
        assert torch.equal(continuation, seen[len(prompt) :])


def test_top_k_keeps_the_most_likely(model: Decoder) -> None:
    prompt, k = _prompts()[0], 3
    settings: dict[str, Any] = {"stop": NO_STOP, "length": 3, "temperature": 50.0}
    drawn = generate(logits(model), [prompt] * 200, range(200), top_k=k, **settings)
    firsts = {int(continuation[0]) for continuation in drawn}
    assert firsts == set(model(prompt[None]).x[0, -1].topk(k).indices.tolist())
    for continuation in drawn[:20]:
        seen = torch.cat([prompt, continuation])
        logits_SV = model(seen[None]).x[0, len(prompt) - 1 : -1]
        best_SK = logits_SV.topk(k).indices
        assert (best_SK == continuation[:, None]).any(1).all()
    free = generate(logits(model), [prompt] * 200, range(200), **settings)
    assert len({int(continuation[0]) for continuation in free}) == VOCABULARY
    greedy = generate(logits(model), [prompt], [0], **settings | {"temperature": 0})
    assert _lists(generate(logits(model), [prompt], [7], top_k=1, **settings)) == _lists(greedy)


def test_a_continuation_ends_with_the_first_stop_id(model: Decoder) -> None:
    stop = [2, 5, 11]
    settings: dict[str, Any] = {"length": LENGTH, "temperature": 3.0}
    prompts = [_prompts()[1]] * 40
    free = _lists(generate(logits(model), prompts, range(40), stop=NO_STOP, **settings))
    stopped = _lists(generate(logits(model), prompts, range(40), stop=stop, **settings))
    assert all(len(own) == LENGTH for own in free)
    for own, longer in zip(stopped, free, strict=True):
        ends = [n for n, token in enumerate(longer) if token in stop]
        assert own == (longer[: ends[0] + 1] if ends else longer)
    assert {len(own) for own in stopped} >= {1, 2, LENGTH}


def test_stop_ids_in_the_prompt_do_not_stop(model: Decoder) -> None:
    prompt = torch.tensor([2, 5, 2])
    (continuation,) = generate(
        logits(model), [prompt], [0], stop=[2, 5], length=1, temperature=1.0, seed=1
    )
    assert len(continuation) == 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_frequencies_are_the_probabilities(model: Decoder, temperature: float) -> None:
    """Fixed by keys, so this passes always or never: chi-square within four sigma."""
    prompt, count = _prompts()[3][:2], 3000
    drawn = generate(
        logits(model),
        [prompt] * count,
        range(count),
        stop=NO_STOP,
        length=1,
        temperature=temperature,
    )
    seen = torch.bincount(torch.cat(drawn), minlength=VOCABULARY).double()
    prob = (model(prompt[None]).x[0, -1] / temperature).softmax(-1).detach()
    expected = prob * count
    common = expected >= 5
    freedom = int(common.sum()) - 1
    assert freedom > 5
    chi2 = float(((seen - expected)[common] ** 2 / expected[common]).sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_draws_differ_by_number_seed_and_position() -> None:
    """A model that knows nothing draws uniformly: what repeats is the fault of the keys."""
    model = decoder(config(moe=None, dense_layers=[]))
    with torch.no_grad():
        model.head.weight.zero_()
    settings: dict[str, Any] = {"stop": NO_STOP, "length": 30, "temperature": 1.0}
    prompt = torch.tensor([1])
    one, two = _lists(generate(logits(model), [prompt] * 2, [0, 1], **settings))
    (other,) = _lists(generate(logits(model), [prompt], [0], **settings, seed=1))
    (same,) = _lists(generate(logits(model), [prompt], [0], **settings))
    assert one == same
    for first, second in ((one, two), (one, other), (one[:-1], one[1:])):
        equal = sum(a == b for a, b in zip(first, second, strict=True))
        assert equal <= 6  # of 30, where 1.3 is expected
    assert len(set(one)) > 10


def test_it_makes_no_graph(model: Decoder) -> None:
    seen: list[Tensor] = []

    def watched(tokens_BS: Tensor, info: TokenInfo) -> Tensor:
        seen.append(model(tokens_BS, info).x)
        return seen[-1]

    generate(watched, _prompts(1), [0], stop=NO_STOP, length=2, temperature=1.0)
    assert len(seen) == 2
    assert not any(own.requires_grad for own in seen)


def test_no_prompts_and_empty_prompts(model: Decoder) -> None:
    settings: dict[str, Any] = {"stop": NO_STOP, "length": 3, "temperature": 1.0}
    assert generate(logits(model), [], [], **settings) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(logits(model), [torch.tensor([], dtype=torch.int64)], [0], **settings)


SPLITS = {
    "rank 1 has none": ([0, 1, 2, 3], []),
    "one and three": ([2], [3, 0, 1]),
    "nobody has any": ([], []),
}


def _on_rank(rank: int) -> dict[str, dict[int, list[int]]]:
    group = dist.group.WORLD
    assert group is not None
    model = decoder(config(), expert_parallel(group)).eval()
    prompts = _prompts()
    results = {}
    for name, split in SPLITS.items():
        mine = split[rank]
        drawn = generate(
            logits(model),
            [prompts[n] for n in mine],
            mine,
            stop=[0],
            length=LENGTH,
            temperature=1.0,
            seed=5,
            group=group,
        )
        results[name] = dict(zip(mine, _lists(drawn), strict=True))
    return results


def test_prompts_split_over_ranks_with_experts_spread(model: Decoder) -> None:
    alone = generate(
        logits(model), _prompts(), range(4), stop=[0], length=LENGTH, temperature=1.0, seed=5
    )
    truth = dict(enumerate(_lists(alone)))
    first, second = run_ranks(2, _on_rank)
    for name, split in SPLITS.items():
        assert first[name] | second[name] == {n: truth[n] for part in split for n in part}
