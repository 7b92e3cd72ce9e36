"""Every method takes probabilities as targets, as mixup and cutmix make them, or its row says why not."""

import pytest
import torch

from elle_fast import methods
from tests.helpers import about, built, convnet, probabilities, random


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_method_takes_probabilities_or_its_row_says_why_not(name):
    torch.manual_seed(0)
    x, target = random(4, 3, 8, 8, seed=1), probabilities(4, 4, dtype=torch.float32)
    criterion, model = built(name, eps=0.03, classes=4, steps=6), convnet()
    if methods.find(name).refuses.get("soft_targets"):
        with pytest.raises(ValueError, match="target: expected int64 class indices"):
            criterion(model, x, target)
        return
    loss = criterion(model, x, target, **about(criterion, x))
    loss.backward()
    assert loss.isfinite()
    assert criterion.output.shape == target.shape
