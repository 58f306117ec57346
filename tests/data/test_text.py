"""Python's own text, cut up without loss and split without leaks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.core.errors import UserError
from coterie.data import text as text_module
from coterie.data.digits import caption, split_digits
from coterie.data.split import held_out
from coterie.data.text import (
    Document,
    documentation,
    passages,
    sections,
    split_text,
    standard_library,
)


@given(st.text(alphabet=st.sampled_from("aé漢😀 .\n")), st.integers(4, 20))
def test_passages_join_to_the_text_and_are_bounded(text: str, limit: int) -> None:
    parts = list(passages(text, limit))
    assert "".join(parts) == text
    assert all(0 < len(part.encode()) <= limit for part in parts)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one two\n\nthree. four five", "one two\n\n"),
        ("one two 3\nfour. five six", "one two 3\n"),
        ("one two three. four", "one two three. "),
        ("one two three four", "one two three "),
        ("onetwothreefourfive", "onetwothreefourf"),
    ],
)
def test_a_cut_falls_at_the_best_boundary(text: str, first: str) -> None:
    assert next(passages(text, 16)) == first


def test_the_documentation_is_there_in_sorted_order() -> None:
    topics = documentation()
    assert len(topics) > 50
    assert [t.name for t in topics] == sorted(t.name for t in topics)
    assert sum(len(t.text.encode()) for t in topics) > 300_000


def test_the_standard_library_is_there_in_sorted_order() -> None:
    sources = standard_library()
    names = [source.name for source in sources]
    assert names == sorted(names)
    assert "source argparse.py" in names


def test_sections_drop_repeated_paragraphs_and_are_bounded() -> None:
    paragraphs = [f"paragraph {n} " * 5 for n in range(40)]
    text = "\n\n".join(paragraphs)
    found = sections([Document("a", text), Document("b", "new\n\n" + text)], limit=300)
    assert "\n\n".join(part.text for part in found) == text + "\n\nnew"
    assert all(len(part.text.encode()) <= 300 for part in found)
    assert [part.name for part in found][-1] == "b #0"


def test_no_held_out_paragraph_is_trained_on() -> None:
    train, held = split_text(documentation(), 0.1)

    def paragraphs(parts: list[Document]) -> set[str]:
        return {" ".join(p.split()) for part in parts for p in part.text.split("\n\n")}

    assert held
    assert not paragraphs(train) & paragraphs(held)
    share = sum(len(p.text) for p in held) / sum(len(p.text) for p in train + held)
    assert 0.05 < share < 0.15


def test_a_python_without_sources_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(text_module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"no sources of the standard library.*data\.sources: 0"):
        standard_library()


def test_a_python_without_documentation_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"no pydoc_data\.topics"):
        documentation()


def test_held_out_is_a_fraction_chosen_by_name() -> None:
    names = [f"file {n}" for n in range(200)]
    chosen = held_out(names, 0.1)
    assert chosen.sum() == 20
    by_name = dict(zip(names, chosen, strict=True))
    backwards = held_out(names[::-1], 0.1)
    assert dict(zip(names[::-1], backwards, strict=True)) == by_name


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(0, 0.5, 0), (1, 0.1, 0), (2, 0.01, 1), (2, 0.99, 1), (9, 0, 0)],
)
def test_held_out_leaves_something_on_both_sides(
    count: int, fraction: float, expected: int
) -> None:
    assert held_out([str(n) for n in range(count)], fraction).sum() == expected


def test_digits_are_split_by_class_and_completely() -> None:
    train, held = split_digits(0.1)
    assert len(train) + len(held) == 1797
    for label in range(10):
        count = (held.label_N == label).sum()
        assert count == round(0.1 * (count + (train.label_N == label).sum()))
    assert caption(7) == "a digit seven"
