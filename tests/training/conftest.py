"""Trainings of these tests draw no pictures, which would be a fifth of their time.

Those that a module's own fixtures start still do: they run before the fixture below.
"""
import pytest
from support.pictures import without_matplotlib


@pytest.fixture(autouse=True)
def no_pictures():
    with without_matplotlib():
        yield
