"""Labels as people write them."""

import numpy as np
import pytest

from diffit_jax.data.labels import class_named, give_out, imagenet_names, parse_labels, period
from diffit_jax.errors import UserError


def test_imagenet_names():
    names = imagenet_names()
    assert (
        len(names) == 1000
        and names[0] == ["tench", "Tinca tinca"]
        and names[999][0] == "toilet tissue"
    )
    assert (
        class_named("golden retriever", names) == class_named(" Golden Retriever ", names) == 207
        and class_named("macaw", names) == 88
    )
    with pytest.raises(
        UserError, match="2 classes are named 'crane': use one of the indices 134, 517"
    ):
        class_named("crane", names)
    with pytest.raises(
        UserError, match="no class is named 'golden retreiver': did you mean golden retriever"
    ):
        class_named("golden retreiver", names)


def test_labels_as_text():
    seeds = range(5)
    assert parse_labels("3,0-1", seeds, 10).tolist() == [3, 0, 1, 3, 0]
    mixed = parse_labels("golden retriever,7,tench", seeds, 1000, imagenet_names())
    assert mixed.tolist() == [207, 7, 0, 207, 7]
    assert give_out([1, 2], 3, 5).tolist() == [1, 2, 1]
    with pytest.raises(UserError, match="label 1000 is outside the classes 0-999"):
        parse_labels("1000", seeds, 1000)


def test_names_of_ones_own_classes():
    """Whatever is in them: commas, digits, other alphabets and the case."""
    names = [["red flowers"], ["tulip, wild"], ["2019"], ["Äpfel"], ["1"]]
    seeds = range(6)
    asked = parse_labels("Red Flowers,tulip, wild,2019,a\u0308pfel,1,0-1", range(7), 5, names)
    assert asked.tolist() == [0, 1, 2, 3, 1, 0, 1]  # 1 is a label before it is a name
    with pytest.raises(UserError, match="no class is named 'rd flowers': did you mean red flowers"):
        parse_labels("rd flowers", seeds, 5, names)
    with pytest.raises(UserError, match="known are red flowers, tulip, wild, 2019"):
        parse_labels("xyzzy", seeds, 5, names)
    with pytest.raises(UserError, match=r"'tulip' is a name, .* known by number only"):
        parse_labels("tulip", seeds, 5)


def test_labels_repeat_after_a_period():
    assert period(np.arange(36) % 3) == 3 and period(np.arange(100) % 10) == 10
    assert period(np.arange(100) % 11) == 0 and period(np.full(8, 4)) == 1
    assert period(np.array([3, 5, 3, 5, 3])) == 2


def test_random_labels_are_a_uniform_function_of_the_seed():
    labels = parse_labels("random", range(20_000), 10)
    assert np.abs(np.bincount(labels, minlength=10) - 2000).max() < 180  # four standard deviations
    np.testing.assert_array_equal(parse_labels("random", [7, 3], 10), labels[[7, 3]])
    assert parse_labels("random", range(5000), 1000).max() > 950
