"""Long lists of parameters, of which the default run has a few."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], *quick: Any) -> list[Any]:
    """All `values` as parameters of a test; those that are not among `quick` are slow. A tuple is several arguments."""
    values = list(values)
    assert all(value in values for value in quick), "a quick value is none of the values"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[] if value in quick else [pytest.mark.slow]
        )
        for value in values
    ]
