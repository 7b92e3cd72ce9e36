import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def surroundings():
    """What a user's training loop has before the README's lines."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10))
    loader = [(torch.rand(8, 3, 4, 4), torch.randint(0, 10, (8,))) for _ in range(5)]
    return {"model": model, "loader": loader, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_blocks_run_as_printed(block):
    exec(compile(block, "README.md", "exec"), surroundings())


def test_the_five_line_loop_trains_and_its_stats_are_as_said():
    (block,) = (block for block in BLOCKS if "criterion.stats" in block)
    names = surroundings()
    before = [parameter.detach().clone() for parameter in names["model"].parameters()]
    exec(block, names)
    assert any(not torch.equal(old, new) for old, new in zip(before, names["model"].parameters(), strict=True))
    said = re.search(r"criterion\.stats +# \{(.*?)\}", block)
    assert said is not None
    assert set(re.findall(r'"(\w+)"', said[1])) == names["criterion"].stats.keys()


def test_make_targets_that_the_readme_names_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)) | {"help"}
    assert {"demo", "test"} <= named <= targets
