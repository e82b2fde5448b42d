"""Keys read from the source text are those of the classes."""

import types
import typing

import numpy as np

from diffit_jax import limits
from diffit_jax.experiment import catalogue
from diffit_jax.experiment import config as experiment

KINDS = {int: "int", float: "float", bool: "bool", str: "str", np.dtype: "dtype"}


def sections():
    """(name, chosen class's name, class, its keys) of every class that a section may have."""
    for name, section in catalogue.sections().items():
        if name in experiment.CHOICES:
            chooser, classes = experiment.CHOICES[name]
            assert section.chooser == chooser and list(section.classes) == list(classes)
        elif name:
            classes = {"": experiment.section_classes({})[name]}
        else:
            classes = {"": experiment.Experiment}
        for chosen, cls in classes.items():
            yield name, chosen, cls, section.classes[chosen]


def test_every_key_is_read_with_its_kind_and_its_words():
    found = {name for name, *_ in sections()}
    assert found == {"", *experiment.section_classes({}), *experiment.CHOICES}
    for name, chosen, cls, keys in sections():
        real = experiment.keys_of(name, cls)
        real.pop("space", None)
        assert set(keys) == set(real), (name, chosen)
        texts = catalogue.docs_of(cls)
        for key, field in real.items():
            declared = limits.type_of(field.type)
            plain = "path" if limits.is_path(field.type) else KINDS.get(declared)
            unions = (None, typing.Union, types.UnionType)
            other = "section" if typing.get_origin(declared) in unions else "list"
            where = name, chosen, key
            if f"{name}.{key}" not in experiment.CHOICES:
                assert keys[key].kind == (plain or other), where
            assert keys[key].needed != experiment.has_default(field), where
            assert keys[key].text == texts.get(key, ""), where


def test_every_key_is_explained():
    """`--config NAME --help` prints it: a field without a line in its docstring would be bare."""
    for name, chosen, _, keys in sections():
        for key in keys.values():
            assert len(key.text) > 11, (name, chosen, key.name)
