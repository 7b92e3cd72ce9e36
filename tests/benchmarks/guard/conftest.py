"""The trainings of these tests draw no pictures, as those of tests/recipes."""

from tests.recipes.conftest import no_pictures

__all__ = ["no_pictures"]
