"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import fedcl

MODULES = sorted(m.name for m in pkgutil.walk_packages(fedcl.__path__, prefix="fedcl."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
