"""An evaluation that was killed goes on, and reuses nothing that another setting made."""

import json
from contextlib import suppress
from typing import Any

import pytest

from elle_fast._core.digests import digest_of
from elle_fast.evaluation import Chunks, evaluate, parse_attacks
from elle_fast.evaluation.chunks import _text
from tests.evaluation.cases import EPS, Linear, around, batched, pixels


class Killed(Chunks):
    """The evaluation ends when it has saved so many times; the file is whole, as it is renamed into its place."""

    left = 1000

    def save(self):
        super().save()
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("calls", range(1, 7))
def test_killed_and_resumed_is_the_same_and_nothing_is_done_twice(calls, tmp_path):
    model = Linear(2, 9)
    x, y = around(model, n=50)
    batches, attacks = batched(x, y, 25), parse_attacks("clean,pgd-1-2,noise-3")
    options: dict[str, Any] = {"eps": 3 * EPS, "seed": 2}
    whole = evaluate(model, batches, attacks, **options)
    assert 0 < whole["pgd-1-2"]["accuracy"] < whole["noise-3"]["accuracy"] < 1
    path = tmp_path / "a.json.partial"
    first = Killed(path, {"checkpoint": "abc"})
    first.left = calls
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, batches, attacks, **options, chunks=first)
    second = Killed(path, {"checkpoint": "abc"})
    done: list[int] = []
    assert evaluate(model, batches, attacks, **options, chunks=second, advance=done.append) == whole
    assert 1000 - second.left == 6 - calls
    assert done == [25] * 6
    second.forget()
    assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 0.2},
        {"seed": 1},
        {"batch_size": 2},
        {"pixels": [9, 120, 251]},
        {"checkpoint": "other"},
        {"name": "pgd-3"},
    ],
)
def test_a_changed_setting_reuses_nothing(change, model, tmp_path):
    setting = {"eps": 0.1, "seed": 0, "batch_size": 3, "pixels": [9, 120, 250], "checkpoint": "one", "name": "pgd-2"}

    def run(setting):
        chunks = Chunks(tmp_path / "partial", {"checkpoint": setting["checkpoint"]})
        seen = []
        hook = model.register_forward_pre_hook(lambda module, args: seen.append(1))
        batches = pixels(setting["pixels"], setting["batch_size"])
        given = {"eps": setting["eps"], "seed": setting["seed"], "chunks": chunks, "check": False}
        result = evaluate(model, batches, setting["name"], **given)
        hook.remove()
        return result[setting["name"]], len(seen)

    result, passes = run(setting)
    assert passes == 4  # one more to count the classes
    assert run(setting) == (result, 0)
    changed, passes = run({**setting, **change})
    assert passes >= 4
    # Neither has taken the other's place.
    assert run(setting) == (result, 0)
    assert run({**setting, **change}) == (changed, 0)


def test_forgetting_leaves_what_others_did(model, tmp_path):
    path = tmp_path / "partial"
    for checkpoint in ("one", "two"):
        evaluate(model, pixels([1]), "clean", eps=0.1, chunks=Chunks(path, {"checkpoint": checkpoint}))
    Chunks(path, {"checkpoint": "one"}).forget()
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["settings"]["checkpoint"] == "two"


def written(path, entries):
    """A whole file of these entries, with the right digest."""
    path.write_text(json.dumps({"format": 2, "digest": digest_of(_text(entries).encode()), "entries": entries}))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1, "entries": []}', '{"format": 2, "entries": []}', "é"])
def test_a_file_that_holds_no_chunks_is_refused(text, tmp_path):
    path = tmp_path / "a.json.partial"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"partial result: expected chunks in format 2, got '.*a\.json\.partial'"):
        Chunks(path, {})
    assert path.read_text(encoding="latin-1") == text


@pytest.mark.parametrize(
    "entries", [5, None, {"a": 1}, [3], [{}], [{"settings": 3, "chunks": {}}], [{"settings": {}, "chunks": [3]}]]
)
def test_containers_of_another_type_are_refused(entries, tmp_path):
    written(tmp_path / "partial", entries)
    with pytest.raises(ValueError, match=r"partial result: expected chunks in format 2, got '.*partial'"):
        Chunks(tmp_path / "partial", {})


def test_no_flipped_bit_is_used(model, tmp_path):
    path = tmp_path / "partial"
    evaluate(model, pixels([9, 120, 250]), "clean", eps=0.1, chunks=Chunks(path, {}))
    whole = path.read_bytes()
    kept = json.loads(whole)["entries"]
    for bit in range(0, 8 * len(whole), 11):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with suppress(ValueError):
            Chunks(path, {})
            # White space, or the same character in other words.
            assert json.loads(changed)["entries"] == kept


@pytest.mark.parametrize(
    "part",
    [
        *(None, 5, [], {}, {"robust": 5, "notes": []}, {"robust": ["111"], "notes": [3]}),
        *({"robust": rows, "notes": []} for rows in (["11"], ["11x"], [], ["111", "111"])),
    ],
)
def test_a_batch_of_another_form_is_attacked_again(part, model, tmp_path):
    path = tmp_path / "partial"
    found = evaluate(model, pixels([9, 120, 250]), "clean", eps=0.1, chunks=Chunks(path, {}))
    (entry,) = json.loads(path.read_text())["entries"]
    written(path, [{**entry, "chunks": dict.fromkeys(entry["chunks"], part)}])
    assert evaluate(model, pixels([9, 120, 250]), "clean", eps=0.1, chunks=Chunks(path, {})) == found
    assert json.loads(path.read_text())["entries"] == [entry]


def test_arguments_of_another_type(tmp_path):
    with pytest.raises(TypeError, match=r"path: expected a path, got 5"):
        Chunks(5, {})  # type: ignore[arg-type]
    for settings in (None, 5, {"a": object()}):
        with pytest.raises(TypeError, match="settings: expected a dictionary of JSON types, got"):
            Chunks(tmp_path / "partial", settings)  # type: ignore[arg-type]
    Chunks(str(tmp_path / "partial"), {}).save()
    assert (tmp_path / "partial").exists()
