import pytest
import torch

from elle_fast._core.files import write_atomically, write_csv, write_json
from elle_fast.recipes import checkpoint, models
from elle_fast.recipes.config import TrainConfig

SHAPE = {"in_shape": [1, 8, 8], "classes": 3, "mean": [0.5], "std": [0.25]}


def state(**change):
    model = models.build("cnn", width=2, in_shape=(1, 8, 8), classes=3, mean=(0.5,), std=(0.25,))
    config = {**vars(TrainConfig(model="cnn", width=2))}
    empty = {"data": "digest", "optimizer": {}, "criterion": {}, "rng": {"cpu": torch.get_rng_state(), "cuda": None}}
    history: dict[str, list[object]] = {"steps": [], "epochs": []}
    whole = {"config": config, "shape": SHAPE, "step": 7, "model": model.state_dict(), "sums": torch.zeros(2), **empty}
    return {**whole, "history": history, "step_counts": {}, "seconds": 0.0, "other_ranks": [], **change}


def test_round_trip_gives_the_model_back(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state())
    model, config, saved = checkpoint.load_model(path)
    assert saved["step"] == 7
    assert config.width == 2
    assert not model.training
    assert all(torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_truncated(tmp_path, kept):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"checkpoint: expected a whole checkpoint, got .*c\.pt"):
        checkpoint.load(path)


def test_not_a_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    path.write_text("hello")
    with pytest.raises(ValueError, match="checkpoint: expected a whole checkpoint"):
        checkpoint.load(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="checkpoint: expected one written by elle-fast"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="checkpoint: expected one written by elle-fast"):
        checkpoint.load(path)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    path = tmp_path / "c.pt"
    torch.save({"format": 1, "config": Harm()}, path)
    with pytest.raises(ValueError, match="checkpoint: expected a whole checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "harm").exists()


def test_newer_format(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state(format=checkpoint.FORMAT + 1))
    with pytest.raises(ValueError, match=r"checkpoint: expected format 1, got 2 .*version of elle-fast that wrote it"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", sorted(checkpoint._KEYS - {"format"}))
def test_missing_entries(name, tmp_path):
    path = tmp_path / "c.pt"
    incomplete = state()
    del incomplete[name]
    checkpoint.save(path, incomplete)
    with pytest.raises(ValueError, match=rf"without \['{name}'\]"):
        checkpoint.load(path)


def test_settings_of_another_version(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state(config={**state()["config"], "novel": 1}))
    with pytest.raises(ValueError, match=r"expected settings that this version knows, got .*with \['novel'\]; read it"):
        checkpoint.load(path)


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "c.pt"
    other = models.build("cnn", width=3, in_shape=(1, 8, 8), classes=3, mean=(0.5,), std=(0.25,))
    checkpoint.save(path, state(model=other.state_dict()))
    with pytest.raises(ValueError, match="checkpoint: expected the weights of this model"):
        checkpoint.load_model(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_rights_that_open_would_give(tmp_path):
    (tmp_path / "plain").touch()
    write_json(tmp_path / "written", 1)
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_csv_of_rows_with_different_keys(tmp_path):
    write_csv(tmp_path / "x.csv", [{"step": 1, "loss": 0.5}, {"step": 2, "lam": 3}])
    assert (tmp_path / "x.csv").read_text() == "step,loss,lam\n1,0.5,\n2,,3\n"
