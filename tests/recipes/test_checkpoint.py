import io
from typing import Any

import pytest
import torch

from elle_fast._core.digests import digest_of
from elle_fast._core.files import write_atomically, write_csv, write_json
from elle_fast.recipes import checkpoint, models
from elle_fast.recipes.config import TrainConfig
from tests._core.test_files import full_disk

SHAPE = {"in_shape": [1, 8, 8], "classes": 3, "mean": [0.5], "std": [0.25]}


def state(**change):
    model = models.build("cnn", width=2, in_shape=(1, 8, 8), classes=3, mean=(0.5,), std=(0.25,))
    config = {**vars(TrainConfig(model="cnn", width=2))}
    empty = {"data": "digest", "optimizer": {}, "criterion": {}, "rng": {"cpu": torch.get_rng_state(), "cuda": None}}
    history: dict[str, list[object]] = {"steps": [], "epochs": []}
    whole = {"config": config, "shape": SHAPE, "step": 7, "model": model.state_dict(), "sums": {}, **empty}
    whole |= {"weights": "trained", "average": {}, "scaler": {}, "guard": {}}
    return {**whole, "history": history, "step_counts": {}, "seconds": 0.0, "other_ranks": [], **change}


def written(path, content):
    """A file of any content with the right digest."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = digest_of(buffer.getvalue()).encode()
    path.write_bytes(buffer.getvalue() + checkpoint._MARK + digest)


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
    torch.save({"format": 1, "weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"got .*c.pt' without a digest .* another version or program wrote it"):
        checkpoint.load(path)
    for content in ({"weights": torch.zeros(1)}, [1, 2]):
        written(path, content)
        with pytest.raises(ValueError, match="checkpoint: expected one written by elle-fast"):
            checkpoint.load(path)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    path = tmp_path / "c.pt"
    written(path, {"format": 1, "config": Harm()})
    with pytest.raises(ValueError, match="checkpoint: expected a whole checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "harm").exists()


def test_newer_format(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state(format=checkpoint.FORMAT + 1))
    with pytest.raises(ValueError, match=r"checkpoint: expected format 5, got 6 .*version of elle-fast that wrote it"):
        checkpoint.load(path)


def test_no_flipped_bit_is_used(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    checkpoint.load(path)
    at = whole.index(checkpoint._MARK)
    for bit in [*range(0, 8 * len(whole), 8 * 97 + 1), *range(8 * at, 8 * len(whole), 3)]:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"checkpoint: expected a whole checkpoint, got '.*c\.pt'"):
            checkpoint.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="checkpoint: expected a whole checkpoint"):
        checkpoint.load(path)


def test_torch_reads_the_file_too(tmp_path):
    checkpoint.save(tmp_path / "c.pt", state())
    read = torch.load(tmp_path / "c.pt", weights_only=True)
    assert torch.equal(read["model"]["net.0.weight"], checkpoint.load(tmp_path / "c.pt")["model"]["net.0.weight"])


def test_a_string_serves_as_a_path_and_nothing_else_does(tmp_path):
    path = str(tmp_path / "c.pt")
    checkpoint.save(path, state())
    assert checkpoint.load_model(path)[1].width == 2
    for bad in (None, 5, [path]):
        for call in (checkpoint.load, checkpoint.load_model, lambda path: checkpoint.save(path, state())):
            with pytest.raises(TypeError, match="path: expected a path, got"):
                call(bad)  # type: ignore[arg-type]


def test_a_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state())
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match=r"File too large: '.*c\.pt'"):
        checkpoint.save(path, state())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


MALFORMED: list[dict[str, Any]] = [
    *({name: bad} for name in sorted(checkpoint._KEYS - {"format"}) for bad in (None, torch.ones(2), [1])),
    {"weights": "best"},
    *({"step": bad} for bad in (-5, 1.5, True)),
    *({"seconds": bad} for bad in (-1.0, float("nan"), "x")),
    *({"config": {"eps": bad}} for bad in (8.0, "x", None)),
    *({"shape": bad} for bad in ({}, {**SHAPE, "classes": 0}, {**SHAPE, "in_shape": None}, {**SHAPE, "mean": "x"})),
    *({"model": bad} for bad in ({}, {3: 3}, {"net.0.weight": 5})),
    *({"history": bad} for bad in ({"steps": 3, "epochs": []}, {"steps": [], "epochs": [{"epoch": 1}]})),
    {"history": {}},
    *({"history": {"steps": [bad], "epochs": []}} for bad in (3, {}, {"step": "x"})),
    *({"sums": bad} for bad in ({"loss": torch.zeros(())}, {"loss": 1})),
    {"other_ranks": [3]},
    {"other_ranks": [{}]},
    {"other_ranks": [{"rng": {}, "sums": {}, "criterion": 3}]},
    {"step_counts": {"full_steps": -1}},
]


@pytest.mark.parametrize("change", MALFORMED, ids=str)
def test_what_no_run_could_have_written_is_one_error_that_names_the_file(change, tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, state(**change))
    with pytest.raises(ValueError, match=r"checkpoint: expected .*, got '.*c\.pt'") as raised:
        checkpoint.load_model(path)
    assert "\n" not in str(raised.value).partition(" with others: ")[0]


@pytest.mark.parametrize("part", ["model", "average", "optimizer", "criterion", "other_ranks"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(part, value, tmp_path):
    whole = state(optimizer={"state": {0: {"momentum_buffer": torch.ones(3)}}}, criterion={"lam": torch.ones(())})
    whole["average"] = {"module.fc.weight": torch.ones(3)}
    whole["other_ranks"] = [{name: whole[name] for name in ("rng", "sums")} | {"criterion": {"lam": torch.ones(())}}]
    checkpoint.save(tmp_path / "c.pt", whole)
    checkpoint.load(tmp_path / "c.pt")
    tensors = {
        "model": whole["model"]["net.0.weight"],
        "average": whole["average"]["module.fc.weight"],
        "optimizer": whole["optimizer"]["state"][0]["momentum_buffer"],
        "criterion": whole["criterion"]["lam"],
        "other_ranks": whole["other_ranks"][0]["criterion"]["lam"],
    }
    tensors[part].view(-1)[0] = value
    checkpoint.save(tmp_path / "c.pt", whole)
    with pytest.raises(ValueError, match=rf"got '.*c\.pt': {part}\..*: expected finite numbers, got others"):
        checkpoint.load(tmp_path / "c.pt")


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
