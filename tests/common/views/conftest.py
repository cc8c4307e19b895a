"""Both back ends of the loader."""

import pytest

from support.loaders import BACKENDS


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    return request.param
