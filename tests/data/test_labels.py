"""Labels as people write them."""

import numpy as np
import pytest

from diffit_jax.data.labels import give_out, imagenet_class, imagenet_names, parse_labels
from diffit_jax.errors import UserError


def test_imagenet_names():
    names = imagenet_names()
    assert (
        len(names) == 1000
        and names[0] == ["tench", "Tinca tinca"]
        and names[999][0] == "toilet tissue"
    )
    assert (
        imagenet_class("golden retriever") == imagenet_class(" Golden Retriever ") == 207
        and imagenet_class("macaw") == 88
    )
    with pytest.raises(
        UserError, match="ImageNet has 2 classes named 'crane': use one of the indices 134, 517"
    ):
        imagenet_class("crane")
    with pytest.raises(
        UserError, match="no class named 'golden retreiver': did you mean golden retriever"
    ):
        imagenet_class("golden retreiver")


def test_labels_as_text():
    seeds = range(5)
    assert parse_labels("3,0-1", seeds, 10).tolist() == [3, 0, 1, 3, 0]
    assert parse_labels("golden retriever,7,tench", seeds, 1000).tolist() == [207, 7, 0, 207, 7]
    assert give_out([1, 2], 3, 5).tolist() == [1, 2, 1]
    with pytest.raises(UserError, match="label 1000 is outside the classes 0-999"):
        parse_labels("1000", seeds, 1000)


def test_random_labels_are_a_uniform_function_of_the_seed():
    labels = parse_labels("random", range(20_000), 10)
    assert np.abs(np.bincount(labels, minlength=10) - 2000).max() < 180  # four standard deviations
    np.testing.assert_array_equal(parse_labels("random", [7, 3], 10), labels[[7, 3]])
    assert parse_labels("random", range(5000), 1000).max() > 950
