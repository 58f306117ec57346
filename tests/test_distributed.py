"""The helper that runs ranks: results, failures, deaths and hangs all come back as text."""

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailure, Ranks, run_ranks


def _sum(rank: int, factor: int) -> int:
    value = torch.tensor(factor * (rank + 1))
    dist.all_reduce(value)
    return int(value)


def _raise_on_one(rank: int) -> None:
    print(f"about to fail on {rank}")
    if rank == 1:
        raise ValueError("the sentence of rank 1")
    dist.barrier()


def _die_on_one(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _wait_forever_in_here(rank: int) -> None:
    if rank == 1:
        threading.Event().wait()


def _threads(rank: int) -> int:
    return torch.get_num_threads()


def _return_a_lambda(rank: int) -> object:
    return lambda: rank


def test_ranks_talk_and_return_by_rank() -> None:
    assert run_ranks(3, _sum, 10) == [60, 60, 60]


def test_a_raising_rank_ends_the_run_with_its_sentence_and_output() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(2, _raise_on_one)
    assert "ValueError: the sentence of rank 1" in str(failure.value)
    assert "about to fail on 1" in str(failure.value)


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankFailure, match="rank 1: died with exit code -9"):
        run_ranks(2, _die_on_one)


def test_a_hung_rank_shows_where_it_is() -> None:
    with pytest.raises(RankFailure, match="_wait_forever_in_here"):
        run_ranks(2, _wait_forever_in_here, timeout=3)


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(RankFailure, match="returned what cannot be sent"):
        run_ranks(1, _return_a_lambda)


def test_leaving_the_block_kills_the_ranks() -> None:
    with Ranks(2, _wait_forever_in_here) as ranks:
        pass
    assert [process.exitcode for process in ranks.processes] == [-9, -9]


def test_tests_and_their_ranks_compute_with_one_thread() -> None:
    assert [torch.get_num_threads(), *run_ranks(2, _threads)] == [1, 1, 1]
