"""What is said of models that draw random numbers."""

import pytest
from torch import nn

from elle_fast.recipes import models, random_layers
from tests.optional import import_torchvision
from tests.recipes.user_nets import norms


def timm(**args):
    import_torchvision()
    args |= {"depth": 2, "embed_dim": 8, "num_heads": 2}
    return models.build("timm:vit_tiny_patch16_224", in_shape=(1, 16, 16), classes=3, args=args)


def test_layers_that_draw_are_counted_by_kind():
    import_torchvision()
    from torchvision.ops import StochasticDepth

    assert random_layers.found(timm()) == {}
    found = random_layers.found(timm(drop_rate=0.1, drop_path_rate=0.2))
    assert found["DropPath"] == [pytest.approx(0.2)] * 2  # of the second block; that of the first has 0
    assert set(found["Dropout"]) == {0.1}
    assert random_layers.found(nn.Sequential(StochasticDepth(0.3, "row"))) == {"StochasticDepth": [0.3]}
    assert random_layers.found(norms(3, (1, 8, 8), drop=0.5)) == {"Dropout": [0.5]}
    assert random_layers.found(nn.MultiheadAttention(4, 2, dropout=0.1)) == {"MultiheadAttention": [0.1]}


def test_a_dropout_that_is_a_function_is_found_by_its_probability():
    import_torchvision()
    args = {"channels": [4, 4, 8, 8], "drop_rate": 0.1}
    model = models.build("timm:resnet18", in_shape=(1, 32, 32), classes=3, args=args)
    assert random_layers.found(model) == {"ResNet": [0.1]}


@pytest.mark.parametrize(
    "name, advice",
    [
        ("timm:resnet18", "--model-args '{drop_rate: 0, drop_path_rate: 0}' trains without"),
        ("torchvision:resnet18", "--model-args '{dropout: 0}' or '{stochastic_depth_prob: 0}', whichever"),
        ("my.nets:build", "an option of its builder may turn them off"),
    ],
)
def test_the_line_says_what_is_done_and_how_to_do_without(name, advice):
    said = random_layers.remark(nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.2)), name)
    assert said is not None
    assert said.startswith("the model draws at random (2 Dropout of up to 0.2): all points of a sample share a draw")
    assert advice in said
    assert random_layers.remark(nn.Sequential(nn.Dropout(0.0)), name) is None
