"""A text classifier that withstands changed embeddings: ``python examples/tokens.py``, some seconds on a CPU.

Needs nothing but the package. The texts are generated reviews ("the plot was not very good but the music seemed fine"),
negative, mixed or positive. Words cannot move by eps, embeddings can: x is an offset, 0 for the clean batch, which the
model adds to its own embeddings. Most of what is gained here comes from N-FGSM; docs/guides/tables-and-tokens.md has
what ELLE-A adds on tokens.
"""

import random
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import ELLELoss, attacks

EPS, DIM, LONGEST = 0.2, 32, 13  # eps in standard deviations of an embedding
NOUNS, VERBS = ("plot", "music", "acting", "ending", "pace", "dialogue"), ("was", "seemed", "felt")
WORDS = {"good": 1, "fine": 1, "superb": 1, "moving": 1, "bad": -1, "dull": -1, "weak": -1, "awful": -1}
VOCABULARY = ("<pad>", "the", "but", "and", "not", "very", "so", *NOUNS, *VERBS, *WORDS)


def reviews(count: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    """Token ids ``[count, LONGEST]``, 0 after the end, and classes: 0 negative, 1 mixed, 2 positive."""
    texts, classes = [], []
    for _ in range(count):
        clauses, said = [], []
        for _ in range(draw.choice((1, 2))):
            word, negated = draw.choice([*WORDS]), draw.random() < 0.25
            adverb = draw.choice(("", "very ", "so "))
            clauses.append(f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} {'not ' * negated}{adverb}{word}")
            said.append(-WORDS[word] if negated else WORDS[word])
        ids = [VOCABULARY.index(word) for word in draw.choice((" but ", " and ")).join(clauses).split()]
        texts.append(ids + [0] * (LONGEST - len(ids)))
        classes.append(1 if sum(said) == 0 else 2 if sum(said) > 0 else 0)
    return torch.tensor(texts), torch.tensor(classes)


class Reader(nn.Module):
    """A transformer of one layer; embeddings are normalised, as they would outgrow any eps otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), DIM)
        self.position = nn.Parameter(0.5 * torch.randn(LONGEST, DIM))
        self.layer = nn.TransformerEncoderLayer(DIM, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(DIM, 3)

    def forward(self, offset: Tensor, tokens: Tensor) -> Tensor:
        """The logits of ``tokens [B, LONGEST]`` with their embeddings moved by ``offset [B, LONGEST, DIM]``."""
        padding = tokens == 0
        x = F.layer_norm(self.embedding(tokens), (DIM,)) + offset + self.position
        x = self.layer(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)
        logits: Tensor = self.head(x.sum(dim=1) / (~padding).sum(dim=1, keepdim=True))
        return logits


def train(loss_of: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> dict[str, float]:
    """Train with ``loss_of(model, offset, tokens, y)``, and return the accuracies on other reviews."""
    torch.manual_seed(0)
    draw = random.Random(0)
    (tokens, y), (test_tokens, y_test) = reviews(2000, draw), reviews(300, draw)
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        for batch in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            loss_of(model, torch.zeros(len(batch), LONGEST, DIM), tokens[batch], y[batch]).backward()
            optimizer.step()
    model.eval()
    reader, clean = partial(model, tokens=test_tokens), torch.zeros(len(y_test), LONGEST, DIM)
    points = {"clean": clean, "robust": attacks.pgd(reader, clean, y_test, EPS, steps=20, bounds=None)}
    with torch.no_grad():
        return {name: (reader(x).argmax(dim=1) == y_test).float().mean().item() for name, x in points.items()}


def main() -> dict[str, float]:
    """Train with the cross-entropy and with ELLE-A on N-FGSM, print both, and return the accuracies with ELLE-A."""
    criterion = ELLELoss(EPS, lam=100.0, adaptive=True, attack="n-fgsm")
    alone = train(lambda model, offset, tokens, y: F.cross_entropy(model(offset, tokens), y))
    # The criterion hands the tokens of a sample to the model with each of its points.
    found = train(lambda model, offset, tokens, y: criterion(model, offset, y, model_kwargs={"tokens": tokens}))
    for name, each in (("cross-entropy", alone), ("ELLE-A", found)):
        print(f"{name}: accuracy {each['clean']:.1%}, embeddings under PGD-20 {each['robust']:.1%}")
    return {**found, "alone": alone["robust"]}


if __name__ == "__main__":
    main()
