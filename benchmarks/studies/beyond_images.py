"""ELLE on what is not an image: a table of measurements, and tokens through a learned embedding.

    python -m benchmarks.studies.beyond_images --out benchmarks/results/beyond_images.json

Nothing is downloaded: both data sets come with scikit-learn. For each seed there is one split, and all methods train on
it from the same weights with the same batches. The settings were chosen on other seeds (10 to 12 for the table, 10 for
the tokens); lam is ELLELoss's default. ``--smoke`` runs all of the code in a few seconds, and measures nothing.

**Tabular rows** ``[B, features]`` need nothing special: ``ELLELoss(eps)(model, x, y)``, with x standardised on the
training rows, so that eps is in standard deviations of a feature. Measurements have no common range: bounds is None.

**Tokens** cannot be perturbed; their embeddings ``[B, tokens, dim]`` can. ELLELoss takes an x that requires no grad,
but the embedding is trained. So it perturbs an offset, which is 0 for the clean batch::

    offset = torch.zeros(*tokens.shape, dim)
    loss = criterion(partial(model, tokens), offset, y)  # model: (tokens, offset) -> logits

The model adds the offset to its own embeddings, which therefore get their gradient from every point. Two things to
know:

- ELLELoss calls the model with more rows than there are tokens: the attack with B, then x_adv, x_a, x_b and x_c in
  blocks of B (all 4B at once, B and 3B with ``forward="split"``). Row i of each block belongs to sample i, so the model
  repeats the embeddings blockwise (``Tensor.repeat``, not ``repeat_interleave``), and all else that belongs to a
  sample, such as a padding mask. This is wrong with ``triplet_fraction`` below 1, whose blocks do not have B rows.
- An embedding that can grow outgrows any eps. Here each token's is normalised to mean 0 and variance 1 over its dim
  numbers (as in Miyato et al. 2017), so eps is in standard deviations of an embedding. The embedding of the position is
  added afterwards and not normalised: the same number is added to clean and to perturbed points.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from sklearn import datasets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks.harness.program import command, parser
from benchmarks.harness.tables import markdown, spread
from elle_fast import ELLELoss, LocalLinearity, TrainingStep, attacks
from elle_fast._core.files import write_json
from elle_fast.recipes.provenance import provenance

Model = Callable[[Tensor], Tensor]
Criterion = Callable[[Model, Tensor, Tensor], Tensor]

LEVELS, CELLS, DIM = 17, 16, 32  # values of a token, tokens of a sample, numbers of an embedding


class Data(NamedTuple):
    """Features float32 ``[N, features]`` or tokens int64 ``[N, tokens]``, and labels int64 ``[N]``."""

    x: Tensor
    y: Tensor


class TokenClassifier(nn.Module):
    """A transformer of one layer over perturbed token embeddings: ``[B, tokens], [k B, tokens, DIM] -> [k B, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LEVELS, DIM)
        self.position = nn.Parameter(0.5 * torch.randn(CELLS, DIM))
        layer = nn.TransformerEncoderLayer(
            DIM, nhead=2, dim_feedforward=64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.head = nn.Linear(CELLS * DIM, 10)

    def embed(self, tokens: Tensor) -> Tensor:
        """What eps is measured against: embeddings ``[B, tokens, DIM]``, each of variance 1."""
        return F.layer_norm(self.embedding(tokens), (DIM,))

    def forward(self, tokens: Tensor, offset: Tensor) -> Tensor:
        """Logits of each row of offset, which holds one or more blocks of B rows."""
        points = self.embed(tokens).repeat(offset.shape[0] // tokens.shape[0], 1, 1) + offset
        logits: Tensor = self.head(self.encoder(points + self.position).flatten(1))
        return logits


def tabular(seed: int) -> tuple[Data, Data]:
    """scikit-learn's breast cancer table: 569 rows of 30 numbers, standardised on the training rows; two classes."""
    table = datasets.load_breast_cancer()
    train, test, y_train, y_test = _split(table.data, table.target, seed)
    scaler = StandardScaler().fit(train)
    return (
        Data(torch.tensor(scaler.transform(train), dtype=torch.float32), torch.tensor(y_train)),
        Data(torch.tensor(scaler.transform(test), dtype=torch.float32), torch.tensor(y_test)),
    )


def tokens(seed: int) -> tuple[Data, Data]:
    """scikit-learn's digits: 1,797 sequences of 16 tokens among 17, the rounded means of 2x2 pixels; ten classes."""
    digits = datasets.load_digits()
    means = np.rint(digits.images.reshape(-1, 4, 2, 4, 2).mean((2, 4))).astype(np.int64)
    train, test, y_train, y_test = _split(means.reshape(-1, CELLS), digits.target, seed)
    return Data(torch.tensor(train), torch.tensor(y_train)), Data(torch.tensor(test), torch.tensor(y_test))


def _split(x: Any, y: Any, seed: int) -> list[Any]:
    parts: list[Any] = train_test_split(x, y.astype(np.int64), test_size=0.25, stratify=y, random_state=seed)
    return parts


def perceptron() -> nn.Module:
    """For the table: 30 measurements, two hidden layers, two classes."""
    return nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))


@dataclass(frozen=True)
class Example:
    """A data set, its model, and how it is trained: Adam under torch's OneCycleLR, which peaks at ``learning_rate``."""

    name: str
    load: Callable[[int], tuple[Data, Data]]
    build: Callable[[], nn.Module]
    eps: float
    epochs: int
    seeds: tuple[int, ...]
    learning_rate: float = 3e-3
    batch_size: int = 64
    pgd_steps: int = 50
    pgd_restarts: int = 2
    limit: int | None = None  # samples of each split


EXAMPLES: tuple[Example, ...] = (
    Example("tabular", tabular, perceptron, eps=0.5, epochs=100, seeds=(0, 1, 2, 3, 4)),
    Example("tokens", tokens, TokenClassifier, eps=0.5, epochs=20, seeds=(0, 1, 2)),
)


def at_points_of(attack: Callable[..., Tensor]) -> Callable[[float], Criterion]:
    """Plain adversarial training: the mean cross-entropy at the points that an attack of radius eps finds."""
    return lambda eps: lambda model, x, y: F.cross_entropy(model(attack(model, x, y, eps, bounds=None)), y)


METHODS: dict[str, Callable[[float], Criterion]] = {
    "plain": lambda eps: lambda model, x, y: F.cross_entropy(model(x), y),
    "fgsm": at_points_of(attacks.fgsm),
    "n-fgsm": at_points_of(attacks.n_fgsm),
    "elle-a": lambda eps: ELLELoss(eps, adaptive=True),
    "n-fgsm+elle-a": lambda eps: ELLELoss(eps, adaptive=True, attack="n-fgsm"),
    "pgd-10": at_points_of(attacks.pgd),
}


def bind(model: nn.Module, x: Tensor) -> tuple[Model, Tensor]:
    """What is attacked and trained: the model on the features, or on an offset to the tokens' embeddings."""
    if x.is_floating_point():
        return model, x
    return partial(model, x), torch.zeros(*x.shape, DIM)


def run(example: Example, method: str, seed: int) -> dict[str, Any]:
    """Train one model and evaluate it; accuracies in [0, 1]."""
    train, test = (Data(part.x[: example.limit], part.y[: example.limit]) for part in example.load(seed))
    torch.manual_seed(seed)
    model, criterion = example.build(), METHODS[method](example.eps)
    steps = len(train.x) // example.batch_size
    optimizer = torch.optim.Adam(model.parameters(), example.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, example.learning_rate, total_steps=example.epochs * steps)
    step = TrainingStep(lambda model, x, y: criterion(*bind(model, x), y), model, optimizer)
    # Its own generator, so that batches are the same for every method: the attacks draw different amounts.
    shuffle = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(example.epochs):
        order = torch.randperm(len(train.x), generator=shuffle)
        for rows in order[: steps * example.batch_size].split(example.batch_size):
            step(train.x[rows], train.y[rows])
            schedule.step()
    seconds = time.perf_counter() - start
    about = {"example": example.name, "method": method, "seed": seed, "seconds": seconds}
    return {**about, **evaluate(example, model, test)}


def evaluate(example: Example, model: nn.Module, test: Data) -> dict[str, float]:
    """Accuracy clean, under FGSM and under PGD in the space that is perturbed, and E_lin, on the test samples."""
    model.eval()
    bound, x = bind(model, test.x)
    # The same starts for every model.
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"steps": example.pgd_steps, "restarts": example.pgd_restarts, "generator": generator}
    points = {
        "clean": x,
        "fgsm": attacks.fgsm(bound, x, test.y, example.eps),
        "pgd": attacks.pgd(bound, x, test.y, example.eps, bounds=None, **options),
    }
    with torch.no_grad():
        found = {name: (bound(each).argmax(1) == test.y).float().mean().item() for name, each in points.items()}
        e_lin = LocalLinearity(example.eps, triplets=4, generator=generator)(bound, x, test.y).item()
    return {**found, "e_lin": e_lin}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: accuracies in per cent, mean and, in brackets, lowest to highest of several seeds.

    A large "FGSM - PGD" is catastrophic overfitting: robust to the attack of training, not to a better one. E_lin is
    the median, and so is the time, that of training over FGSM's with the same seed.
    """
    head = ["example", "method", "test clean", "test FGSM", "test PGD", "FGSM - PGD", "E_lin", "time"]
    rows = []
    fgsm = {(each["example"], each["seed"]): each["seconds"] for each in runs if each["method"] == "fgsm"}
    for name, method in dict.fromkeys((each["example"], each["method"]) for each in runs):
        found = [each for each in runs if (each["example"], each["method"]) == (name, method)]
        columns = [[each[attack] for each in found] for attack in ("clean", "fgsm", "pgd")]
        columns.append([each["fgsm"] - each["pgd"] for each in found])
        cells = [spread(column) for column in columns]
        e_lin = statistics.median(each["e_lin"] for each in found)
        ratio = statistics.median(each["seconds"] / fgsm[name, each["seed"]] for each in found)
        rows.append((name, method, *cells, f"{e_lin:.0e}", f"{ratio:.1f}x"))
    return markdown(head, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and evaluate everything, write the JSON file, print the table."""
    options_of = parser("benchmarks.studies.beyond_images", __doc__)
    options_of.add_argument("--smoke", action="store_true", help="an epoch, a seed, few PGD steps: measures nothing")
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options = options_of.parse_args(arguments)
    # The tensors are so small that a second thread costs more than it saves.
    torch.set_num_threads(1)
    examples = EXAMPLES
    if options.smoke:
        tiny: dict[str, Any] = {"epochs": 1, "seeds": (0,), "pgd_steps": 2, "pgd_restarts": 1, "limit": 128}
        examples = tuple(replace(each, **tiny) for each in EXAMPLES)
    runs = []
    for example in examples:
        for seed in example.seeds:
            # Methods innermost: what slows the machine for a while slows all of them.
            for method in METHODS:
                print(f"{example.name}, seed {seed}, {method}", file=sys.stderr, flush=True)
                runs.append(run(example, method, seed))
    about = provenance(command(options_of, options))
    about["versions"]["scikit-learn"] = sklearn.__version__
    settings = [{**asdict(each), "load": each.load.__name__, "build": each.build.__name__} for each in examples]
    write_json(
        options.out, {"smoke": options.smoke, **about, "lam": ELLELoss(0.0).lam, "examples": settings, "runs": runs}
    )
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
