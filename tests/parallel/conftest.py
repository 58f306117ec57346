"""One tiny dataset for all tests of the trainer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.parallel.tiny import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: 40 training and 7 held-out documents."""
    return write_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As ranks have. With more, on a busy machine, the threads of tiny tensors wait for each other
    many times as long as they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
