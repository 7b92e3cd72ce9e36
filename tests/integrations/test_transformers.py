"""ELLETrainer in real trainings of an image and a text classifier, against the plain loop."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from elle_fast import ELLELoss, methods
from elle_fast.integrations.transformers import ELLETrainer, token_losses
from tests.helpers import built, labels, random, rng
from tests.integrations.cases import CLASSES, EPS, MEAN, STD, Noted, criterion, plain, same, state

N, LENGTH, VOCABULARY = 24, 7, 20
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


def vit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES, hidden_dropout_prob=0.1, **SIZES
    )
    return transformers.ViTForImageClassification(config)


def bert(of_tokens: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, max_position_embeddings=16, **SIZES)
    kind = transformers.BertForTokenClassification if of_tokens else transformers.BertForSequenceClassification
    return kind(config)


PIXELS = random(N, 1, 8, 8, seed=1)
IMAGES = [{"pixel_values": x, "labels": int(y)} for x, y in zip(PIXELS, labels(N, CLASSES), strict=True)]
IDS = torch.randint(VOCABULARY, (N, LENGTH), generator=rng(1))
MASK = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (N, 1), generator=rng(2))).long()
TEXTS = [
    {"input_ids": ids, "attention_mask": mask, "labels": int(y)}
    for ids, mask, y in zip(IDS, MASK, labels(N, CLASSES), strict=True)
]
TAGS = labels(N * LENGTH, CLASSES).view(N, LENGTH).masked_fill(MASK == 0, -100)
TAGGED = [{**text, "labels": tags} for text, tags in zip(TEXTS, TAGS, strict=True)]


def trainer(folder: Path, model: Any, loss: Any, data: Any, **options: Any) -> ELLETrainer:
    normalized = options.pop("normalized", False)
    others = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    given: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    args = transformers.TrainingArguments(str(folder), **{**given, **options})
    return ELLETrainer(
        model, args, criterion=loss, normalized=normalized, train_dataset=data, eval_dataset=data, **others
    )


def fitted(folder: Path, model: Any, loss: Any, data: Any, resume: Any = None, **options: Any) -> tuple[Any, Any]:
    run, noted = trainer(folder, model, loss, data, **options), Noted(loss)
    torch.manual_seed(1)
    run.train(resume_from_checkpoint=resume)
    return run, noted.losses


class ByHand(nn.Module):
    """The model as a user would write it around a text classifier: offsets in, logits out."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, offsets: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
        embedded = self.inner.get_input_embeddings()(input_ids) + offsets * attention_mask[..., None]
        return self.inner(inputs_embeds=embedded, attention_mask=attention_mask).logits


def by_hand(run: ELLETrainer, model: Any, loss: Any, parts: int = 1) -> list[Tensor]:
    """The plain loop over the batches of a Trainer, whose loader draws a number when it is made."""
    torch.manual_seed(1)
    loader = run.get_train_dataloader()
    whole = ByHand(model) if "Bert" in type(model).__name__ else lambda x: model(x).logits
    model.train()

    def loss_of(model: Any, x: Any, y: Any) -> Tensor:
        if "pixel_values" in x:
            found: Tensor = loss(whole, x["pixel_values"], y)
        else:
            kwargs = {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}
            found = loss(whole, torch.zeros(*x["input_ids"].shape, 16), y, model_kwargs=kwargs)
        return found

    loss_of.frozen = loss.frozen  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return plain(model, loss_of, ((x, x["labels"]) for x in loader), parts=parts, optimizer=optimizer)


@pytest.mark.parametrize(
    "make, data, loss",
    [
        (vit, IMAGES, criterion),
        (vit, IMAGES, partial(criterion, forward="checkpoint")),
        (vit, IMAGES, lambda: methods.build("trades-single", eps=EPS)),
        (bert, TEXTS, criterion),
        (lambda: bert(of_tokens=True), TAGGED, partial(criterion, loss_fn=token_losses)),
    ],
    ids=["images", "images-checkpoint", "images-trades", "texts", "tokens"],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_losses_are_the_plain_loops(make, data, loss, parts, tmp_path):
    mine, other, losses_of = make(), make(), loss()
    steps = {"gradient_accumulation_steps": parts, "max_steps": 6 // parts}
    run, losses = fitted(tmp_path, mine, losses_of, data, **steps)
    assert len(losses) == 6
    assert same(losses, by_hand(trainer(tmp_path, other, loss(), data, **steps), other, loss(), parts))
    assert same(state(mine), state(other))
    row = run.state.log_history[-2]
    assert losses_of.stats.keys() <= row.keys()
    assert row["loss"] == pytest.approx(float(sum(losses[-parts:]) / parts), abs=1e-4)  # it rounds what it logs
    # Afterwards the model is as it was: called with a positional argument too.
    assert "logits" in mine(data[0]["pixel_values"][None] if data is IMAGES else data[0]["input_ids"][None])


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Seen twice too large where the Trainer takes a loss for one that is divided already."""
    found = []
    for parts in (1, 2):
        model = bert()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # masks would differ
        before = [weight.detach().clone() for weight in model.parameters()]
        loss = ELLELoss(0.0, 0.0)  # without noise, of which a part draws its own
        steps = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 8 // parts, "max_steps": 1}
        fitted(tmp_path, model, loss, TEXTS, **steps)
        found.append([old - new.detach() for old, new in zip(before, model.parameters(), strict=True)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    assert found[0][0].norm() > 0  # the embeddings are trained


def test_a_resume_goes_on_to_the_bit(tmp_path):
    """Of BERT: transformers 5.24 saves ViT by other names than it loads in a resume, and warns of missing keys."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, losses = fitted(tmp_path, bert(), criterion(), TEXTS, **options)
    middle = tmp_path / "checkpoint-2"
    model = bert()
    nn.init.zeros_(model.classifier.weight)
    resumed, rest = fitted(tmp_path / "again", model, criterion(), TEXTS, resume=str(middle), **options)
    assert same(rest, losses[2:])
    assert same(state(resumed.model), state(whole.model))
    assert same(state(resumed.criterion), state(whole.criterion))
    assert int(resumed.criterion.controller.count) == 4
    (middle / "criterion.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"criterion.pt: expected the criterion's state"):
        fitted(tmp_path / "again", bert(), criterion(), TEXTS, resume=str(middle), **options)


RANKS = r"""
import sys
from pathlib import Path
from tests.optional import import_torchvision
import_torchvision()
import torch
torch.set_num_threads(1)
from accelerate import debug_launcher
from tests.integrations import test_transformers as here
debug_launcher(here.rank_run, (Path(sys.argv[1]),), num_processes=2)
"""


def rank_run(folder: Path) -> None:
    """A training in two processes, each with accumulated batches of its own, and what comes of it."""
    loss = criterion()
    run, _ = fitted(folder / "run", bert(), loss, TEXTS, gradient_accumulation_steps=2, max_steps=3)
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    torch.save([state(run.model), state(loss)], folder / f"{run.args.process_index}.pt")


@pytest.mark.slow
def test_two_processes_have_the_same_lam_and_weights(tmp_path):
    done = subprocess.run([sys.executable, "-c", RANKS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (weights, lam), (others, other_lam) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(weights, others)
    assert same(lam, other_lam)
    counted = dict(zip(criterion().state_dict(), lam, strict=True))["controller.count"]
    assert counted == 3  # once for each step


def test_normalized_pixels(tmp_path):
    seen: list[Tensor] = []
    loss = criterion(mean=MEAN, std=STD, bounds=(0.0, 1.0))
    loss.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    data = [{**image, "pixel_values": (image["pixel_values"] - MEAN[0]) / STD[0]} for image in IMAGES]
    fitted(tmp_path, vit(), loss, data, normalized=True, max_steps=1)
    near = (seen[0][:, None] - PIXELS[None]).abs().amax(dim=(2, 3, 4)).amin(dim=1)
    assert near.max() <= 4 * torch.finfo(torch.float32).eps


def test_evaluation_is_the_trainers_own(tmp_path):
    loss = criterion()
    run = trainer(tmp_path, vit(), loss, IMAGES)
    before, metrics = state(loss), run.evaluate()
    with torch.no_grad():
        expected = nn.functional.cross_entropy(run.model.eval()(PIXELS).logits, labels(N, CLASSES))
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert same(before, state(loss))


def test_token_losses_leave_out_what_does_not_count():
    logits = torch.randn(2, 3, CLASSES, generator=rng(1))
    target = torch.tensor([[0, 2, -100], [-100, -100, -100]])
    expected = nn.functional.cross_entropy(logits[0, :2], target[0, :2])
    torch.testing.assert_close(token_losses(logits, target), torch.stack([expected, torch.zeros(())]))


@pytest.mark.parametrize(
    "loss, options, error, said",
    [
        (nn.CrossEntropyLoss(), {}, TypeError, r"^criterion: expected ELLELoss"),
        (built("pgi", eps=EPS), {}, ValueError, r"^criterion: expected one without a memory"),
        (criterion(logits=lambda out: out.logits), {}, ValueError, r"^criterion: expected logits=None"),
        (criterion(), {"normalized": True}, ValueError, r"^normalized: expected a criterion with"),
        (criterion(), {"compute_loss_func": print}, ValueError, r"^compute_loss_func: .*never sees the model"),
        (criterion(), {"label_smoothing_factor": 0.1}, ValueError, r"^label_smoothing_factor: expected 0"),
    ],
)
def test_options_that_break_the_method(loss, options, error, said, tmp_path):
    with pytest.raises(error, match=said):
        trainer(tmp_path, vit(), loss, IMAGES, **options)


@pytest.mark.parametrize(
    "model, data, loss, said",
    [
        (vit, [{"pixel_values": x} for x in PIXELS], criterion(), r"^inputs: expected labels, got pixel_values"),
        (bert, TEXTS, criterion(bounds=(0.0, 1.0)), r"^criterion: expected no bounds"),
        (bert, TEXTS, built("fgsm", eps=EPS, bounds=(0.0, 1.0)), r"^criterion: expected no bounds"),
    ],
)
def test_batches_that_do_not_fit(model, data, loss, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        fitted(tmp_path, model(), loss, data, max_steps=1)
