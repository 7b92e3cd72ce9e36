"""A model that is in train mode but for one part."""

import pytest

from tests.evaluation.cases import Threshold


@pytest.fixture
def model():
    model = Threshold()
    model.train()
    model.drop.eval()  # modes need not agree with the parent's
    return model
