"""The site as `make docs` builds it, once for all tests of it."""

from pathlib import Path

import pytest

from tests.docs.building import built


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built site."""
    return built()
