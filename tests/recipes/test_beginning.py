"""What a run begins with: its normalisation, its weights, and what is said of them."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from elle_fast.recipes import checkpoint, cli, foreign, models
from elle_fast.recipes import train as training
from elle_fast.recipes.beginning import begin
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.model_options import ModelOptions
from tests.optional import import_torchvision
from tests.recipes.test_checkpoint import state

USER = "tests.recipes.user_nets"
OF_DATA = ([0.1], [0.2])
BASE = ["train", "--limit", "24", "--test-limit", "8", "--validation", "0", "--batch-size", "8", "--epochs", "2"]
BASE += ["--device", "cpu", "--eval-attacks", "clean,fgsm", "--log-every", "1", "--checkpoint-every", "2"]
BASE += ["--schedule", "constant"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("elle_fast.recipes.result.plot_curves", lambda *args, **more: None)
    yield
    torch.set_num_threads(before)


def begun(saved=None, in_shape=(1, 8, 8), classes=3, **options):
    return begin(ModelOptions(**options), 0, in_shape, classes, lambda: OF_DATA, saved)


def run(capsys, *arguments, stop=None, status=0):
    """The lines on standard error of a training, which may be stopped in the middle."""
    original, steps = training._Loop._step, 0

    def step(loop, x, y):
        nonlocal steps
        steps += 1
        if stop is not None and steps > stop:
            raise KeyboardInterrupt
        original(loop, x, y)

    training._Loop._step = step  # type: ignore[method-assign]
    try:
        assert cli.main([*BASE, *map(str, arguments)]) == (status if stop is None else 130)
    finally:
        training._Loop._step = original  # type: ignore[method-assign]
    return capsys.readouterr().err


def weights_of(folder):
    return checkpoint.load(folder / "checkpoint.pt")["model"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


# ---- Normalisation


def test_scratch_models_have_the_training_images():
    found = begun(model=f"{USER}:norms")
    assert (found.shape["mean"], found.shape["std"]) == OF_DATA
    assert found.notes == ["normalises with mean 0.1, std 0.2 of the training images"]
    assert found.weights == ""
    assert begun(model="cnn").notes == []  # as it has always been


def test_normalisation_can_be_turned_off():
    found = begun(model=f"{USER}:norms", normalize=False)
    assert found.shape["mean"] is None
    assert found.notes == []
    assert not any(isinstance(each, models.Normalize) for each in found.model.modules())


@pytest.mark.parametrize("channels", [3, 1])
def test_weights_of_a_timm_network_have_timm_s_configuration(channels, tmp_path):
    import_torchvision()
    options = {"model": "timm:vit_tiny_patch16_224", "model_args": {"depth": 1, "embed_dim": 8, "num_heads": 2}}
    shape = {"in_shape": (channels, 16, 16)}
    source = begun(**shape, **options, normalize=False).model
    torch.save(source.state_dict(), tmp_path / "w.pt")
    found = begun(**shape, **options, weights=str(tmp_path / "w.pt"))
    assert (found.shape["mean"], found.shape["std"]) == ([0.5] * channels, [0.5] * channels)
    several = ", averaged over its channels" if channels == 1 else ""
    said = f"of timm's configuration of vit_tiny_patch16_224{several}"
    assert re.fullmatch(rf"normalises with mean 0\.5.*, std 0\.5.* {re.escape(said)}", found.notes[0])
    assert found.notes[1] == f"begins with the weights in {tmp_path / 'w.pt'}, digest {found.weights}"


def test_what_torchvision_s_weights_were_trained_with():
    import_torchvision()
    found = foreign.configured_statistics("torchvision:resnet18", nn.Identity())
    assert found is not None
    assert found[0] == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # ImageNet's, as all over the field
    assert found[1] == "torchvision's ResNet18_Weights.IMAGENET1K_V1"


def test_a_user_s_network_may_say_its_own():
    net = nn.Identity()
    assert foreign.configured_statistics("my:net", net) is None
    net.pretrained_cfg = {"mean": (0.3,), "std": (0.4,)}  # type: ignore[assignment]
    assert foreign.configured_statistics("my:net", net) == (([0.3], [0.4]), "pretrained_cfg of my:net")


def test_weights_of_a_run_have_that_run_s(tmp_path):
    checkpoint.save(tmp_path / "c.pt", state())
    found = begun(model="cnn", width=2, weights=str(tmp_path / "c.pt"))
    assert (found.shape["mean"], found.shape["std"]) == ([0.5], [0.25])
    assert found.notes[0] == f"normalises with mean 0.5, std 0.25 of {tmp_path / 'c.pt'}"
    without = models.build("cnn", width=2, in_shape=(1, 8, 8), classes=3).state_dict()
    shape = {"in_shape": [1, 8, 8], "classes": 3, "mean": None, "std": None}
    checkpoint.save(tmp_path / "d.pt", state(shape=shape, model=without))
    found = begun(model="cnn", width=2, weights=str(tmp_path / "d.pt"))
    assert found.shape["mean"] is None
    assert found.notes[0] == f"does not normalise, as {tmp_path / 'd.pt'}"


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_that_hold_a_normalisation_have_it(name, tmp_path):
    source = models.build("cnn", width=2, in_shape=(1, 8, 8), classes=3, mean=[0.5], std=[0.25]).state_dict()
    file, save = tmp_path / name, torch.save if name == "w.pt" else safetensors.torch.save_file
    save(source, file)
    found = begun(model="cnn", width=2, weights=str(file))
    assert (found.shape["mean"], found.shape["std"]) == ([0.5], [0.25])
    assert found.notes[0] == f"normalises with mean 0.5, std 0.25 of {file}"
    assert same(found.model.state_dict(), source)


@pytest.mark.parametrize("name", ["w.pt", "checkpoint.pt"])
def test_weights_with_a_normalisation_contradict_no_normalize(name, tmp_path):
    file = tmp_path / name
    if name == "w.pt":
        torch.save(state()["model"], file)
    else:
        checkpoint.save(file, state())
    with pytest.raises(ValueError, match=rf"normalize: expected True .* the weights in {file} were trained behind"):
        begun(model="cnn", width=2, weights=str(file), normalize=False)


def test_weights_with_another_number_of_channels_in_their_normalisation(tmp_path):
    more = {f"normalize.{name}": torch.ones(3, 1, 1) for name in ("mean", "std")}
    torch.save({**state()["model"], **more}, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"weights: expected normalize\.mean .* of 1 numbers each, .* got .*\[3, 1, 1\]"
    ):
        begun(model="cnn", width=2, weights=str(tmp_path / "w.pt"))


# ---- What is said, and refused


def test_random_layers_and_leftovers_are_said_once(tmp_path, capsys):
    said = run(capsys, "--model", f"{USER}:norms", "--model-args", "{drop: 0.1}", "--out", tmp_path / "a")
    assert said.count("warning: the model draws at random (1 Dropout of up to 0.1)") == 1
    said = run(capsys, "--model", f"{USER}:with_leftovers", "--out", tmp_path / "b", "--optimizer", "adamw", stop=4)
    assert said.count("warning: no logit depends on net.unused, so these weights stay as they are") == 1
    run(capsys, "--model", f"{USER}:with_leftovers", "--out", tmp_path / "b", "--optimizer", "adamw", "--resume")
    assert torch.equal(weights_of(tmp_path / "b")["net.unused"], torch.ones(3))


def test_fewer_classes_than_the_labels_are_said_before_the_first_step(tmp_path, capsys):
    said = run(capsys, "--model", f"{USER}:of_seven", "--out", tmp_path / "a", status=2)
    assert (
        "to return logits of shape [2, 10] for 2 pictures, as the data have 10 classes, got a tensor of shape" in said
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "resnet51"}, "model: expected one of 'preact'"),
        ({"model": "timm:resnet18", "width": 4}, "width: model 'timm:resnet18' has no such option (got 4); model_args"),
        ({"model": "cnn", "model_args": {"depth": 1}}, "model_args: model 'cnn' has no such option (got {'depth': 1})"),
        ({"model": "cnn", "pretrained": True}, "pretrained: model 'cnn' has no such option (got True); give the file"),
        ({"model": "my:net", "pretrained": True}, "give the file by weights, or load them in the callable"),
        ({"model": "cnn", "small_images": True}, "small_images: model 'cnn' is made for small pictures"),
        (
            {"model": "timm:resnet18", "pretrained": True, "weights": "w.pt"},
            "weights, pretrained: expected at most one",
        ),
        ({"new_head": True}, "new_head: there is no file of weights"),
        ({"freeze_norm": True}, "freeze_norm: without weights to begin with"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**options).resolved()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_args": "depth: 4"}, "model_args: expected a mapping from names to values, got 'depth: 4' (str)"),
        ({"model_args": {1: 2}}, "model_args: expected strings as names, got 1 (int)"),
        ({"model_args": {"a": {1, 2}}}, "model_args: expected numbers, strings, lists and mappings, got {1, 2} (set)"),
        ({"layer_decay": 0}, "layer_decay: expected a finite number in (0, 1], got 0"),
        ({"layer_decay": 1.5}, "layer_decay: expected a finite number in (0, 1], got 1.5"),
        ({"weights": 5}, "weights: expected a string, got 5 (int)"),
    ],
)
def test_options_of_the_wrong_kind(options, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        TrainConfig(**options)


def test_model_args_survive_a_file_and_the_command_line(tmp_path, capsys):
    given = {"depth": 4, "rates": [0.1, 1e-3], "act": "gelu", "bias": False, "more": {"a": None}}
    config = TrainConfig(model="my:net", model_args={**given, "rates": (0.1, "1e-3")})
    assert config.model_args == given
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "run.yaml") == config
    for words in ([json.dumps(given)], ["depth: 4, rates: [0.1, 1e-3], act: gelu, bias: false, more: {a: null}"]):
        options = cli.read_options("train", ["--model", "my:net", "--model-args", *words])
        assert options.run == config
    assert cli.read_options("train", ["--config", str(tmp_path / "run.yaml")]).run == config
    for bad in ("depth=4", "{depth:4}"):
        assert cli.main(["train", "--model-args", bad]) == 2
        assert "did you mean '{depth: 4}'?" in capsys.readouterr().err


# ---- Runs with weights


def test_weights_are_needed_by_no_resume_and_no_evaluation(tmp_path, capsys):
    torch.manual_seed(3)
    source = models.build(f"{USER}:batch_norms", in_shape=(1, 8, 8), classes=10)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    given = ["--model", f"{USER}:batch_norms", "--weights", tmp_path / "w.safetensors", "--freeze-norm"]
    said = run(capsys, *given, "--out", tmp_path / "whole")
    assert f"begins with the weights in {tmp_path / 'w.safetensors'}, digest " in said
    run(capsys, *given, "--out", tmp_path / "cut", stop=3)
    began = checkpoint.load(tmp_path / "cut" / "checkpoint.pt")["initial_weights"]
    assert began in said
    # Other weights, or none, are not those of the run.
    safetensors.torch.save_file({**source.state_dict(), "0.bias": torch.ones(4)}, tmp_path / "w.safetensors")
    other = run(capsys, *given, "--out", tmp_path / "cut", "--resume", status=2)
    assert (
        f"weights: expected what '{tmp_path / 'cut' / 'checkpoint.pt'}' began with, weights of digest {began}" in other
    )
    with pytest.raises(ValueError, match=r"began with, weights of digest .*, got fresh weights \(None\)"):
        checkpoint.check_same_weights({"initial_weights": began}, None, "c.pt")
    (tmp_path / "w.safetensors").unlink()
    run(capsys, *given, "--out", tmp_path / "cut", "--resume")
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    trained = weights_of(tmp_path / "cut")
    for name, value in source.state_dict().items():
        assert torch.equal(trained[f"net.{name}"], value) is name.startswith(("1.running", "1.num")), name
    model, config, _ = checkpoint.load_model(tmp_path / "cut" / "checkpoint.pt", model=f"{USER}:batch_norms")
    assert config.weights == str(tmp_path / "w.safetensors")
    assert same(model.state_dict(), trained)


def test_a_fresh_run_resumed_with_weights_is_refused(tmp_path, capsys):
    run(capsys, "--model", "mlp", "--width", "2", "--out", tmp_path / "a", stop=1)
    more = ["--weights", tmp_path / "w.pt"]
    torch.save({}, tmp_path / "w.pt")
    said = run(capsys, "--model", "mlp", "--width", "2", "--out", tmp_path / "a", "--resume", *more, status=2)
    assert "began with, fresh weights, got weights of digest" in said


def test_frozen_norms_of_a_network_without_any_are_refused(tmp_path, capsys):
    said = run(capsys, "--model", f"{USER}:norms", "--freeze-norm", "--out", tmp_path / "a", status=2)
    assert f"freeze_norm: model '{USER}:norms' has no batch norm, so this option does not apply" in said


def test_a_checkpoint_alone_may_name_no_function(tmp_path, monkeypatch):
    """Else a checkpoint from somebody else could call any, with any arguments."""
    monkeypatch.chdir(Path(__file__).parents[2])
    harm = {"command": f"touch {tmp_path / 'harm'}"}
    for model, args in (("os:system", harm), (f"{USER}:batch_norms", {})):
        config = {**vars(TrainConfig(model=model, model_args=args))}
        net = models.build(f"{USER}:batch_norms", in_shape=(1, 8, 8), classes=3, mean=[0.5], std=[0.25])
        checkpoint.save(tmp_path / "c.pt", state(config=config, model=net.state_dict()))
        with pytest.raises(
            ValueError, match=rf"model: '.*c\.pt' is to be built by the function '{model}'; a file from"
        ):
            checkpoint.load_model(tmp_path / "c.pt")
    assert not (tmp_path / "harm").exists()
    assert same(checkpoint.load_model(tmp_path / "c.pt", model=model)[0].state_dict(), net.state_dict())
