"""Ids to text and images and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from coterie.data.digits import load_digits
from coterie.data.vocabulary import IMAGE, TEXT, Vocabulary

DEFAULT = Vocabulary()


def test_the_ids_are_where_the_documentation_says() -> None:
    assert DEFAULT.size == 277
    assert (DEFAULT.boi, DEFAULT.eoi, DEFAULT.eod, DEFAULT.pad) == (273, 274, 275, 276)
    assert DEFAULT.codes_per_image == 64


@given(st.text())
def test_text_survives(text: str) -> None:
    assert DEFAULT.decode_text(DEFAULT.encode_text(text)) == text


def test_bad_utf8_becomes_a_replacement_character() -> None:
    assert DEFAULT.decode_text([65, 0xC3, 66, DEFAULT.eod]) == "A\N{REPLACEMENT CHARACTER}B"


@given(st.data(), st.integers(2, 300), st.integers(1, 9))
def test_images_survive(data: st.DataObject, levels: int, side: int) -> None:
    vocabulary = Vocabulary(levels=levels, side=side)
    flat = data.draw(st.lists(st.integers(0, levels - 1), min_size=side**2, max_size=side**2))
    image_HW = np.array(flat).reshape(side, side)
    codes = vocabulary.encode_image(image_HW)
    assert vocabulary.is_image(codes).all()
    np.testing.assert_array_equal(vocabulary.decode_image(codes), image_HW)


def test_a_real_digit_survives() -> None:
    image_HW = load_digits().image_NHW[7]
    assert image_HW.max() == 16
    decoded = DEFAULT.decode_image(DEFAULT.encode_image(image_HW))
    np.testing.assert_array_equal(decoded, image_HW)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 7), int), "not 8 × 8"),
        (np.full((8, 8), 17), "outside 0 … 16"),
        (np.full((8, 8), -1), "outside 0 … 16"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(image: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DEFAULT.encode_image(image)


@pytest.mark.parametrize("codes", [[256] * 63, [256] * 65, [255] * 64, [273] * 64])
def test_codes_that_are_no_image_are_refused(codes: list[int]) -> None:
    with pytest.raises(ValueError, match="64 grey-level ids"):
        DEFAULT.decode_image(codes)


def test_only_grey_levels_are_images() -> None:
    tokens = torch.arange(DEFAULT.size)
    expected = torch.tensor([TEXT] * 256 + [IMAGE] * 17 + [TEXT] * 4)
    assert torch.equal(DEFAULT.modality(tokens), expected)
    np.testing.assert_array_equal(DEFAULT.is_image(tokens.numpy()), expected.bool())


def test_a_mixed_stream_decodes_to_its_pieces() -> None:
    vocabulary = Vocabulary(levels=3, side=2)
    image_HW = np.array([[0, 1], [2, 0]])
    tokens = vocabulary.join(
        [vocabulary.captioned(image_HW, "a digit"), vocabulary.encode_text("é")]
    )
    caption, image, text = vocabulary.decode(tokens)
    assert (caption, text) == ("a digit", "é")
    np.testing.assert_array_equal(image, image_HW)
    assert vocabulary.decode([]) == []
    (cut,) = vocabulary.decode([vocabulary.boi, 257, 258])
    np.testing.assert_array_equal(cut, [1, 2])


@pytest.mark.parametrize("wrong", [{"levels": 1}, {"levels": 65277}, {"side": 0}, {"sid": 8}])
def test_an_impossible_vocabulary_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Vocabulary(**wrong)


def test_the_largest_vocabulary_fits_its_storage() -> None:
    assert Vocabulary(levels=65276).pad == np.iinfo(np.uint16).max
