"""Layer-wise learning rates: which layer a weight is of, and the optimiser's groups."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from elle_fast.recipes import depths, models, optimizers
from elle_fast.recipes import train as training
from elle_fast.recipes.train import CHECKPOINT, train
from tests.optional import import_torchvision
from tests.recipes.test_train import CONFIG, assert_same_run, dataset, quiet
from tests.recipes.user_nets import with_logits


def build(model, **options):
    return optimizers.build("sgd", model, **{"momentum": 0.9, "weight_decay": 0.1, "decay": "all", **options})


def rates(optimizer):
    return {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}


@pytest.mark.parametrize(
    "name, args",
    [
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 8, "num_heads": 2}),
        ("resnet18", {"channels": [4, 4, 8, 8]}),
    ],
)
def test_timm_s_networks_have_timm_s_rates(name, args):
    import_torchvision()
    from timm.optim import param_groups_layer_decay

    model = models.build(f"timm:{name}", in_shape=(3, 32, 32), classes=3, args=args, mean=[0.5] * 3, std=[0.5] * 3)
    optimizer = build(model, layer_decay=0.75)
    optimizers.steer(optimizer, 0.1, 0.9)
    found = rates(optimizer)
    theirs = param_groups_layer_decay(model.get_submodule("net"), weight_decay=0.1, layer_decay=0.75)
    expected = {id(each): 0.1 * group["lr_scale"] for group in theirs for each in group["params"]}
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(rate) for key, rate in expected.items())


def test_blocks_are_the_layers_of_our_networks():
    model = models.build("preact", in_shape=(1, 8, 8), classes=3, width=2, mean=[0.5], std=[0.5])
    found = depths.layers(model)
    assert found["net.stem.weight"] == 0
    assert {found[name] for name in found if name.startswith("net.stages.1.0.")} == {2}
    assert found["net.bn.weight"] == found["net.stages.2.0.conv1.weight"] == 3  # a norm is of the layer before it
    assert found["net.fc.weight"] == found["net.fc.bias"] == max(found.values()) == 4


def test_blocks_inside_of_modules_are_layers_too():
    found = depths.layers(with_logits(3))
    assert found == {
        **{"encoder.first.weight": 0, "encoder.first.bias": 0},
        **{
            f"encoder.layer.{index}.{name}": index + 1
            for index in (0, 1)
            for name in ("0.weight", "0.bias", "1.weight", "1.bias")
        },
        **{"classifier.weight": 3, "classifier.bias": 3},
    }


def test_each_layer_of_a_sequential_network_is_one():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 2))
    assert depths.factors(net, 0.5) == {
        **{"0.weight": 0.25, "0.bias": 0.25, "2.weight": 0.25, "2.bias": 0.25},
        **{"3.weight": 0.5, "3.bias": 0.5, "4.weight": 1.0, "4.bias": 1.0},
    }


def test_norms_and_biases_of_each_layer_do_not_decay_on_request():
    model = models.build("cnn", in_shape=(1, 8, 8), classes=3, width=2)
    groups = build(model, layer_decay=0.5, decay="weights").param_groups
    assert [(group["rate_factor"], group["weight_decay"]) for group in groups] == [
        (factor, decay) for factor in (0.125, 0.25, 0.5, 1.0) for decay in (0.1, 0.0)
    ]
    for group in groups:
        assert all((each.dim() > 1) is (group["weight_decay"] > 0) for each in group["params"])


def test_a_step_moves_each_layer_by_its_rate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    before = [each.detach().clone() for each in model.parameters()]
    optimizer = build(model, layer_decay=0.5, weight_decay=0.0)
    model(torch.ones(3, 2, dtype=torch.float64)).sum().backward()
    optimizers.steer(optimizer, 0.1, 0.9)
    optimizer.step()
    for old, new, factor in zip(before, model.parameters(), (0.5, 0.5, 1.0, 1.0), strict=True):
        assert new.grad is not None
        torch.testing.assert_close(new, old - 0.1 * factor * new.grad)


def test_weights_that_are_frozen_are_left_out():
    model = models.build("cnn", in_shape=(1, 8, 8), classes=3, width=2)
    model.get_parameter("0.weight").requires_grad_(False)
    assert sum(len(group["params"]) for group in build(model).param_groups) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("optimizer", optimizers.NAMES)
def test_a_resumed_run_ends_with_the_same_bits(optimizer, tmp_path, monkeypatch):
    from elle_fast.recipes import result as ending

    monkeypatch.setattr(ending, "plot_curves", lambda *args, **more: None)
    rate = {"optimizer": optimizer, "layer_decay": 0.5, "decay": "weights", "epochs": 2, "schedule": "cosine"}
    config = replace(CONFIG, **rate)
    train(config, tmp_path / "whole", dataset=dataset(), console=quiet())
    original = training._Loop._step

    def stopped(loop, x, y):
        if loop.run.step == 11:
            raise KeyboardInterrupt
        original(loop, x, y)

    monkeypatch.setattr(training._Loop, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", dataset=dataset(), console=quiet())
    monkeypatch.setattr(training._Loop, "_step", original)
    train(config, tmp_path / "cut", dataset=dataset(), console=quiet(), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(ValueError, match=r"layer_decay = 0\.75 \(checkpoint: 0\.5\)"):
        train(replace(config, layer_decay=0.75), tmp_path / "cut", dataset=dataset(), console=quiet(), resume=True)
    assert (tmp_path / "cut" / CHECKPOINT).exists()
