"""Python blocks of README and the pages run as printed, those of a page one after the other, as a reader would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.docs.pages import PAGES, ROOT, python_of
from tests.optional import import_torchvision

import_torchvision()  # of which timm imports a part

WITH_CODE = [page for page in PAGES if python_of(page)[1]]


def stand_ins() -> dict[str, Any]:
    """What a page may take for granted: somebody's model, batches and optimiser."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10))
    loader = [(torch.rand(8, 3, 4, 4), torch.randint(0, 10, (8,))) for _ in range(5)]
    return {"torch": torch, "model": model, "loader": loader, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def run(page: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    before, blocks = python_of(page)
    names = {**stand_ins(), "monkeypatch": monkeypatch}
    exec(compile(before, f"{page.name}, before the code", "exec"), names)
    del names["monkeypatch"]
    # As whole as a reader's script: where a block fails, the page and the line in it are named.
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run_as_printed(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = run(page, monkeypatch)
    assert not list(tmp_path.iterdir())  # no page leaves files behind
    if page.name == "plain-loop.md":
        # What the page says of its own numbers.
        clean, robust = (names[each]["pgd-20"]["accuracy"] for each in ("before", "after"))
        assert clean < 0.5 * names["before"]["clean"]["accuracy"]
        assert robust > clean + 0.1


def test_code_that_fails_is_seen(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nfrom elle_fast import ELLELoss\nELLELoss(eps=-1)\n```\n")
    with pytest.raises(ValueError, match="eps"):
        run(page, monkeypatch)
