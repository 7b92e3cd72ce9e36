"""Weights from files: what is read, what they are copied into, and what is refused."""

import re
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from elle_fast.recipes import checkpoint, models, weights
from tests.recipes.test_checkpoint import state
from tests.recipes.user_nets import batch_norms

USER = "tests.recipes.user_nets"


def net(classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return batch_norms(classes)


def equal(one: nn.Module, two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, two[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("entry", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_with_its_usual_wrappings(entry, prefix, tmp_path):
    source = net(seed=1).state_dict()
    content = {prefix + name: value for name, value in source.items()}
    torch.save(content if entry is None else {entry: content, "epoch": 3}, tmp_path / "w.pth")
    target = net()
    digest = models.load_weights(target, tmp_path / "w.pth")
    assert equal(target, source)
    assert digest == weights.read(tmp_path / "w.pth").digest
    assert len(digest) == 32


def test_safetensors_behind_a_normalisation(tmp_path):
    source = net(seed=1).state_dict()
    kept = {
        name: value for name, value in source.items() if not name.endswith("num_batches_tracked")
    }  # as timm's files
    safetensors.torch.save_file(kept, tmp_path / "w.safetensors")
    target = models.build(f"{USER}:batch_norms", in_shape=(1, 8, 8), classes=3, mean=[0.5], std=[0.25])
    models.load_weights(target, str(tmp_path / "w.safetensors"))
    assert equal(weights.network_of(target), source)
    assert target.state_dict()["normalize.mean"].item() == 0.5


def test_the_network_inside_the_choice_of_logits(tmp_path):
    build: dict[str, Any] = {"in_shape": (1, 8, 8), "classes": 3}
    source = models.build(f"{USER}:with_logits", **build)
    inner = weights.network_of(source)
    assert type(inner).__name__ == "Net"
    torch.save(inner.state_dict(), tmp_path / "w.pt")
    torch.manual_seed(5)
    target = models.build(f"{USER}:with_logits", **build, mean=[0.5], std=[0.25])
    models.load_weights(target, tmp_path / "w.pt")
    assert equal(weights.network_of(target), inner.state_dict())


def test_a_checkpoint_of_a_run_brings_its_normalisation(tmp_path):
    saved = state()
    checkpoint.save(tmp_path / "c.pt", saved)
    found = weights.read(tmp_path / "c.pt")
    assert found.statistics == ([0.5], [0.25])
    target = models.build("cnn", width=2, in_shape=(1, 8, 8), classes=3, mean=(0,), std=(1,))
    models.load_weights(target, tmp_path / "c.pt")
    assert equal(target, saved["model"])


@pytest.mark.parametrize("mean", [None, [0.5]])
def test_the_names_that_a_checkpoint_gives_a_foreign_network(mean, tmp_path):
    build: dict[str, Any] = {"in_shape": (1, 8, 8), "classes": 3, "mean": mean}
    source = models.build(f"{USER}:with_logits", **build).state_dict()
    assert set(source) >= {("net." if mean else "") + "model.classifier.weight"}
    torch.save(source, tmp_path / "w.pt")
    for other in (None, [0.25]):
        target = models.build(f"{USER}:with_logits", **{**build, "mean": other})
        models.load_weights(target, tmp_path / "w.pt", classes=3)
        inner = {name.removeprefix("net.").removeprefix("model."): value for name, value in source.items()}
        assert equal(weights.network_of(target), inner)
        if mean and other:
            assert target.state_dict()["normalize.mean"].item() == 0.5


STATISTICS = {
    "one alone": ({"normalize.mean": torch.zeros(1)}, "one per channel, in {file}, got normalize.mean [1]"),
    "channels": (
        {"normalize.mean": torch.zeros(3, 1, 1), "normalize.std": torch.ones(3, 1, 1)},
        "of 1 numbers each, one per channel, in {file}, got normalize.mean [3, 1, 1], normalize.std [3, 1, 1]",
    ),
    "no std": (
        {"normalize.mean": torch.zeros(1), "normalize.std": torch.zeros(1)},
        "one per channel, in {file}: std: expected numbers in [",
    ),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_a_normalisation_that_does_not_fit_is_refused(case, tmp_path):
    given, message = STATISTICS[case]
    build: dict[str, Any] = {"in_shape": (1, 8, 8), "classes": 3, "mean": [0.5], "std": [0.25]}
    target = models.build(f"{USER}:batch_norms", **build)
    kept = {name: value.clone() for name, value in target.state_dict().items()}
    others = {name: value for name, value in kept.items() if name.startswith("net.")}
    torch.save({**others, "net.0.bias": torch.ones(4), **given}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=re.escape(message.replace("{file}", str(tmp_path / "w.pt")))):
        models.load_weights(target, tmp_path / "w.pt")
    assert equal(target, kept)


def test_a_normalisation_of_another_form_is_the_same_numbers(tmp_path):
    build: dict[str, Any] = {"in_shape": (3, 8, 8), "classes": 3}
    source = models.build("cnn", width=2, **build, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]).state_dict()
    form = {name: source[name].view(1, 3, 1, 1) for name in ("normalize.mean", "normalize.std")}
    torch.save({**source, **form}, tmp_path / "w.pt")
    target = models.build("cnn", width=2, **build, mean=[0.0] * 3)
    models.load_weights(target, tmp_path / "w.pt")
    assert equal(target, source)


def test_names_that_the_network_has_itself_are_its_own():
    net = nn.Sequential()
    net.normalize = models.Normalize([0.5], [0.25])
    found = weights.Weights(net.state_dict(), "", None)
    assert weights.statistics(found, net, 1, "w.pt") is None
    assert weights.statistics(found, nn.Identity(), 1, "w.pt") == ([0.5], [0.25])


def test_a_network_without_a_last_layer_has_no_head(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 4)).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="new_head: expected a linear layer or a convolution with 3 outputs"):
        models.load_weights(nn.Sequential(nn.Linear(2, 4)), tmp_path / "w.pt", classes=3, new_head=True)


def test_a_head_for_other_classes(tmp_path):
    source = net(classes=7, seed=1).state_dict()
    torch.save(source, tmp_path / "w.pt")
    target = net()
    said = (
        r"weights: expected a head of 3 classes, got .*w\.pt with 5\.weight for 7; new_head \(--new-head\) begins with"
    )
    with pytest.raises(ValueError, match=said):
        models.load_weights(target, tmp_path / "w.pt", classes=3)
    models.load_weights(target, tmp_path / "w.pt", classes=3, new_head=True)
    fresh = net().state_dict()
    for name, value in target.state_dict().items():
        assert torch.equal(value, fresh[name] if name.startswith("5.") else source[name])


def test_a_fresh_head_for_as_many_other_classes(tmp_path):
    source = net(seed=1).state_dict()
    torch.save(source, tmp_path / "w.pt")
    target = net()
    models.load_weights(target, tmp_path / "w.pt", classes=3, new_head=True)
    assert torch.equal(target.get_parameter("5.weight"), net().get_parameter("5.weight"))
    assert torch.equal(target.get_parameter("0.weight"), source["0.weight"])


CASES = {
    "missing": (lambda w: {"0.weight": w["0.weight"]}, "missing: 0.bias, 1.weight, 1.bias and 4 more"),
    "unexpected": (lambda w: {**w, "more": torch.ones(1)}, "unexpected: more"),
    "another shape": (
        lambda w: {**w, "0.weight": torch.ones(4, 3, 3, 3)},
        "of another shape: 0.weight [4, 3, 3, 3] in place of [4, 1, 3, 3]",
    ),
    "a number of another shape": (
        lambda w: {**w, "1.num_batches_tracked": torch.ones(1)},
        "of another shape: 1.num_batches_tracked [1] in place of []",
    ),
    "another type": (
        lambda w: {**w, "0.bias": torch.ones(4, dtype=torch.int8)},
        "of another type: 0.bias torch.int8 in place of torch.float32",
    ),
    "float8": (
        lambda w: {**w, "0.bias": torch.ones(4).to(torch.float8_e4m3fn)},
        "expected one of float16, bfloat16, float32, float64 in '{file}', got torch.float8_e4m3fn in 0.bias; convert",
    ),
    "not finite": (lambda w: {**w, "0.bias": torch.full((4,), torch.nan)}, "expected finite numbers in"),
    "empty": (lambda w: {}, "expected tensors by name"),
    "no tensors": (lambda w: {"epoch": 5}, "got 5 (int) as 'epoch'"),
    "a list": (lambda w: [1], "got '{file}' with [1] (list)"),
    "a pickle": (lambda w: {"model": net()}, "a pickle is not loaded"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named_with_its_file(case, tmp_path):
    change, message = CASES[case]
    path, target = tmp_path / "w.pt", net()
    torch.save(change(net(seed=1).state_dict()), path)
    with pytest.raises(ValueError, match=re.escape(message.replace("{file}", str(path)))) as caught:
        models.load_weights(target, path, classes=3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert equal(net(), target.state_dict())  # left as it was


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_is_cut_off_or_not_there(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=r"weights: expected a file, got .*, where there is none"):
        weights.read(path)
    for content in (b"", b"hello", b"\x80\x04K\x05."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"weights: expected .*{re.escape(name)}'"):
            weights.read(path)
    save = torch.save if name == "w.pt" else safetensors.torch.save_file
    save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=rf"weights: expected .*{re.escape(name)}'"):
        weights.read(path)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"state_dict": Harm()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="a pickle is not loaded"):
        weights.read(tmp_path / "w.pt")
    assert not (tmp_path / "harm").exists()
