"""benchmarks/studies/beyond_images.py: ELLELoss on a table and on token embeddings."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.studies import beyond_images
from benchmarks.studies.beyond_images import CELLS, DIM, LEVELS, TokenClassifier
from elle_fast import ELLELoss, attacks
from tests.helpers import cross_entropy64

EPS = 0.5


@pytest.fixture
def batch():
    """A model in float64, tokens that differ between samples, their offset and labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TokenClassifier().double()
        tokens = torch.randint(LEVELS, (6, CELLS))
        return model, tokens, torch.zeros(6, CELLS, DIM, dtype=torch.float64), torch.randint(10, (6,))


def test_smoke(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert beyond_images.main(["--smoke", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["smoke"]
    assert content["command"] == "python -m benchmarks.studies.beyond_images --smoke --out=out.json"
    assert {"machine", "versions", "commit"} <= content.keys()
    assert "scikit-learn" in content["versions"]
    assert str(tmp_path) not in out.read_text()
    expected = [(example, method, 0) for example in ("tabular", "tokens") for method in beyond_images.METHODS]
    assert [(each["example"], each["method"], each["seed"]) for each in content["runs"]] == expected
    accuracies = [each[attack] for each in content["runs"] for attack in ("clean", "fgsm", "pgd")]
    assert all(0 <= each <= 1 for each in accuracies)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(expected)


def test_a_run_learns_and_can_be_repeated():
    example = replace(beyond_images.EXAMPLES[0], epochs=5, pgd_steps=5)
    runs = [beyond_images.run(example, "elle-a", seed=1) for _ in range(2)]
    # The classes are 37 and 63 % of the rows.
    assert runs[0]["clean"] > 0.8
    assert runs[0]["fgsm"] < runs[0]["clean"]
    assert {**runs[0], "seconds": 0} == {**runs[1], "seconds": 0}


def test_the_data_of_a_seed():
    (x, y), (test_x, test_y) = beyond_images.tabular(0)
    assert x.shape == (426, 30)
    assert len(test_x) == len(test_y) == 569 - 426
    # On the training rows alone, so that nothing of the test rows is known. float32 sums of 426 numbers of size 1.
    torch.testing.assert_close(x.mean(0), torch.zeros(30), rtol=0, atol=426 * 2**-24)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(30), rtol=426 * 2**-24, atol=0)
    assert test_x.mean(0).abs().max() > 1e-2
    assert set(y.tolist()) == set(test_y.tolist()) == {0, 1}

    (tokens, y), (test_tokens, _) = beyond_images.tokens(0)
    assert tokens.dtype == y.dtype == torch.int64
    assert tokens.shape[1] == test_tokens.shape[1] == CELLS
    assert len(tokens) + len(test_tokens) == 1797
    assert set(tokens.unique().tolist()) <= set(range(LEVELS))
    assert not torch.equal(tokens, beyond_images.tokens(1)[0].x)
    torch.testing.assert_close(tokens, beyond_images.tokens(0)[0].x, rtol=0, atol=0)


def test_eps_is_in_standard_deviations_of_an_embedding(batch):
    model, tokens, _, _ = batch
    with torch.no_grad():
        model.embedding.weight.mul_(100)
    variance = model.embed(tokens).var(2, correction=0)
    # layer_norm adds 1e-5 to a variance that is about 1e4 here.
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-8, atol=0)


def test_each_block_of_offsets_is_added_to_the_same_tokens(batch):
    model, tokens, offset, _ = batch
    blocks = [offset + 0.1 * k * torch.randn_like(offset) for k in range(4)]
    apart = torch.cat([model(tokens, block) for block in blocks])
    # The same operations on rows of a larger batch: their sums may be made in another order, in float64.
    torch.testing.assert_close(model(tokens, torch.cat(blocks)), apart, rtol=1e-10, atol=1e-10)
    # Samples are not mixed up: row i of a block has the tokens of sample i.
    single = torch.cat([model(tokens[i : i + 1], blocks[2][i : i + 1]) for i in range(6)])
    torch.testing.assert_close(apart[12:18], single, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("forward", ["packed", "split", "checkpoint"])
def test_elle_loss_on_tokens_is_its_formula(batch, forward):
    """The loss with a seed known in advance, against the points of the same seed put through the model one by one."""
    model, tokens, offset, y = batch
    seen: list[torch.Tensor] = []

    def bound(points):
        if torch.is_grad_enabled() and not points.requires_grad:
            seen.append(points.detach())
        return model(tokens, points)

    lam = 4000.0
    criterion = ELLELoss(EPS, lam, generator=torch.Generator().manual_seed(3))
    criterion(bound, offset, y)
    x_adv, x_a, x_b, x_c = torch.cat(seen).chunk(4)
    torch.testing.assert_close(x_adv, attacks.fgsm(partial(model, tokens), offset, y, EPS), rtol=0, atol=0)
    assert all(EPS / 2 < each.abs().max() <= EPS for each in (x_a, x_b))
    # alpha of each sample, from any of its numbers that tells x_a from x_b.
    alpha = ((x_c - x_a).flatten(1).sum(1) / (x_b - x_a).flatten(1).sum(1)).numpy()
    ce, loss_a, loss_b, loss_c = (cross_entropy64(model(tokens, each), y) for each in (x_adv, x_a, x_b, x_c))
    e_lin = ((loss_c - (1 - alpha) * loss_a - alpha * loss_b) ** 2).mean()

    other = ELLELoss(EPS, lam, forward=forward, generator=torch.Generator().manual_seed(3))
    loss = other(partial(model, tokens), offset, y)
    # alpha is found by a division of sums of 512 differences, 1e-16 each, which may cancel to about 1e-1 of their size.
    assert loss.item() == pytest.approx(ce.mean() + lam * e_lin, rel=1e-9)
    loss.backward()
    used = torch.zeros(LEVELS, dtype=torch.bool)
    used[tokens.unique()] = True
    # The embedding learns: of each token that is there, and of no other.
    assert torch.equal(model.embedding.weight.grad.abs().sum(1) > 0, used)


def test_every_method_trains_the_embedding(batch):
    model, tokens, offset, y = batch
    model, offset = model.float(), offset.float()
    for name, method in beyond_images.METHODS.items():
        model.zero_grad()
        method(EPS)(partial(model, tokens), offset, y).backward()
        assert model.embedding.weight.grad.abs().max() > 0, name


def test_bind_leaves_features_alone_and_makes_an_offset_for_tokens(batch):
    model, tokens, offset, _ = batch
    x, plain = torch.randn(3, 30), nn.Linear(30, 2)
    assert beyond_images.bind(plain, x) == (plain, x)
    bound, made = beyond_images.bind(model.float(), tokens)
    torch.testing.assert_close(made, offset.float(), rtol=0, atol=0)
    torch.testing.assert_close(bound(made), model(tokens, made), rtol=0, atol=0)


def test_the_table_has_mean_and_range_over_the_seeds():
    def run(method, seed, fgsm, pgd, e_lin, seconds):
        about = {"example": "tabular", "method": method, "seed": seed, "seconds": seconds}
        return {**about, "clean": 0.5, "fgsm": fgsm, "pgd": pgd, "e_lin": e_lin}

    runs = [run("fgsm", 0, 0.9, 0.1, 1e-3, 1.0), run("fgsm", 1, 0.8, 0.4, 3e-3, 2.0), run("x", 1, 0.5, 0.5, 2e-5, 5.0)]
    lines = beyond_images.table(runs).splitlines()
    assert lines[0].split(" | ")[1:6] == ["method", "test clean", "test FGSM", "test PGD", "FGSM - PGD"]
    numbers = "50.0 (50.0 to 50.0) | 85.0 (80.0 to 90.0) | 25.0 (10.0 to 40.0) | 60.0 (40.0 to 80.0)"
    assert lines[2] == f"| tabular | fgsm | {numbers} | 2e-03 | 1.0x |"
    assert lines[3].endswith("| 0.0 | 2e-05 | 2.5x |")
    assert len(lines) == 4
