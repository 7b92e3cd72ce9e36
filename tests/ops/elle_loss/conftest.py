"""Every test here runs with poisoned memory."""

import pytest

from tests.helpers import poison_uninitialised_memory

poisoned = pytest.fixture(autouse=True)(poison_uninitialised_memory)
