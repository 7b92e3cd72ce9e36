"""Batch norms that keep their statistics, and those that share them over processes."""

import copy

import pytest
import torch
from torch import nn

from elle_fast.recipes import norms
from elle_fast.recipes.averaging import WeightAverage
from tests.recipes.user_nets import batch_norms


def net():
    torch.manual_seed(0)
    model = batch_norms(3)
    norm = model.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.uniform_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model


def test_statistics_stay_and_scales_are_trained():
    model, expected = net(), net().eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert norms.freeze(model) == 1
    x = torch.rand(4, 1, 8, 8)
    for each in (model, copy.deepcopy(model), WeightAverage(model, 0.9).module):
        each.train()
        assert each.training
        torch.testing.assert_close(each(x), expected(x))
        assert all(torch.equal(value, before[name]) for name, value in each.named_buffers())
    model(x).sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in model.get_submodule("1").parameters())


def test_the_state_fits_the_network_without_it():
    model, other = net(), batch_norms(3)
    norms.freeze(model)
    other.load_state_dict(model.state_dict())
    assert list(other.state_dict()) == list(model.state_dict())


def test_freezing_twice_and_nothing_to_freeze():
    model = net()
    norms.freeze(model)
    kind = type(model.get_submodule("1"))
    assert norms.freeze(model) == 1
    assert type(model.get_submodule("1")) is kind
    assert isinstance(model.get_submodule("1"), nn.BatchNorm2d)
    assert norms.freeze(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == 0


def test_a_batch_norm_with_an_activation_keeps_it():
    from tests.optional import import_torchvision

    import_torchvision()
    layers = pytest.importorskip("timm.layers")
    norm = layers.BatchNormAct2d(2)
    x = torch.randn(3, 2, 4, 4)
    expected = norm.eval()(x)
    norms.freeze(nn.Sequential(norm))
    assert torch.equal(norm.train()(x), expected)
    assert expected.min() == 0


def test_the_average_of_norms_is_ready():
    """Files often leave out how many batches a norm has seen."""
    model = net()
    with pytest.raises(RuntimeError, match="average: expected batch norms that have seen data"):
        WeightAverage(model, 0.9).ready()
    norms.freeze(model)
    WeightAverage(model, 0.9).ready()


def test_activations_inside_of_norms_survive_the_conversion_to_synced_ones():
    """torch's conversion would make a plain SyncBatchNorm of timm's norm with a ReLU."""
    from tests.optional import import_torchvision

    import_torchvision()
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layers.BatchNormAct2d(2), nn.BatchNorm2d(2))
    x = torch.rand(2, 1, 6, 6)
    expected = model.eval()(x)
    converted = norms.synced(model)
    assert sum(isinstance(each, nn.SyncBatchNorm) for each in converted.modules()) == 2
    assert torch.equal(converted.eval()(x), expected)
    assert isinstance(norms.synced(batch_norms(3))[1], nn.SyncBatchNorm)  # type: ignore[index]


def test_a_batch_norm_of_an_unknown_class_is_not_converted():
    class Loud(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="sync_batchnorm: expected batch norms of torch or timm, got Loud"):
        norms.synced(nn.Sequential(Loud(2)))
