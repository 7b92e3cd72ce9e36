"""draws.py: random layers draw alike at all points of a sample, in every forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import checkpoint

from elle_fast import ELLELoss, LocalLinearity, draws
from elle_fast.draws import Draws, Level
from elle_fast.methods import build
from elle_fast.testing import no_host_sync
from tests.helpers import convnet, grads_of, labels, random, rng, shown

BATCH, CLASSES, STEPS, WIDTH = 4, 3, 5, 6
FORWARDS = ("packed", "split", "checkpoint")


class Net(nn.Module):
    """A random layer between two linear ones: ``[N, 5, 6] -> [N, 3]``."""

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.last = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.layer(self.first(x)).mean(1))
        return out


def as_maps(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda h: layer(h.unflatten(2, (2, 3))).flatten(2)


def timms_drop_path(h: Tensor) -> Tensor:
    mask = h.new_empty((h.shape[0],) + (1,) * (h.ndim - 1)).bernoulli_(0.5)
    return h + h * mask.div_(0.5)


def torchvisions_depth(h: Tensor, *, by_row: bool) -> Tensor:
    size = [h.shape[0] if by_row else 1] + [1] * (h.ndim - 1)
    return h + h * torch.empty(size, dtype=h.dtype, device=h.device).bernoulli_(0.5).div_(0.5)


def frames(h: Tensor) -> Tensor:
    out: Tensor = F.dropout(h.flatten(0, 1), 0.5).unflatten(0, (-1, STEPS))
    return out


def frames_time_first(h: Tensor) -> Tensor:
    out: Tensor = F.dropout(h.transpose(0, 1).flatten(0, 1), 0.5).unflatten(0, (STEPS, -1))
    return out.transpose(0, 1)


def video_time_first(h: Tensor) -> Tensor:
    return F.dropout(h.transpose(0, 1)[..., None, None], 0.5)[..., 0, 0].transpose(0, 1)


def native(h: Tensor) -> Tensor:
    out: Tensor = torch.native_dropout(h, 0.5, True)[0]
    return out


class Attention(nn.Module):
    """Linear in x: queries and keys are weights."""

    def __init__(self, batch_first: bool, weights: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.batch_first, self.weights = batch_first, weights
        self.query = nn.Parameter(torch.randn(1, STEPS, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.5, batch_first=batch_first)

    def forward(self, h: Tensor) -> Tensor:
        query = self.query.expand(len(h), -1, -1)
        inputs = [each if self.batch_first else each.transpose(0, 1) for each in (query, query, h)]
        out: Tensor = self.attention(*inputs, need_weights=self.weights)[0]
        return out if self.batch_first else out.transpose(0, 1)


def sdpa(h: Tensor) -> Tensor:
    ones = torch.ones_like(h)[:, None]
    return F.scaled_dot_product_attention(ones, ones, h[:, None], dropout_p=0.5)[:, 0]


LINEAR: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "Dropout": lambda: nn.Dropout(0.5),
    "Dropout1d": lambda: nn.Dropout1d(0.5),
    "Dropout2d": lambda: as_maps(nn.Dropout2d(0.5)),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "FeatureAlphaDropout": lambda: as_maps(nn.FeatureAlphaDropout(0.5)),
    "functional": lambda: lambda h: F.dropout(h, 0.3),
    "native_dropout": lambda: native,
    "timm's DropPath": lambda: timms_drop_path,
    "torchvision's StochasticDepth": lambda: lambda h: torchvisions_depth(h, by_row=True),
    "by the batch": lambda: lambda h: torchvisions_depth(h, by_row=False),
    "uniform noise": lambda: lambda h: h + torch.rand(h.shape),
    "normal noise": lambda: lambda h: h + torch.randn_like(h) + torch.normal(0.0, 1.0, h.shape),
    "a sign for each sample": lambda: lambda h: h * (2 * torch.randint(0, 2, (len(h), 1, 1)) - 1),
    "bernoulli of a tensor": lambda: lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "bernoulli_ of a tensor": lambda: lambda h: h * torch.empty_like(h).bernoulli_(torch.tensor(0.5)),
    "exponential": lambda: lambda h: h * torch.empty_like(h).exponential_(),
    "locked dropout": lambda: lambda h: h * F.dropout(torch.ones(1, len(h), WIDTH), 0.5).transpose(0, 1),
    "attention": lambda: Attention(True, False),
    "attention, sequence first": lambda: Attention(False, False),
    "sdpa": lambda: sdpa,
}
ENCODER = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.5)
LSTM = nn.LSTM(WIDTH, WIDTH, 2, dropout=0.5, batch_first=True)
OTHERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.5, batch_first=True),
    "encoder, sequence first": lambda: lambda h: ENCODER(h.transpose(0, 1)).transpose(0, 1),
    "LSTM": lambda: lambda h: LSTM(h)[0],
    "gumbel": lambda: lambda h: F.gumbel_softmax(h, hard=True),
    "another probability in each row": lambda: lambda h: torch.bernoulli(h.sigmoid().detach()) * h,
}


@torch.library.custom_op("elle_fast_tests::noisy", mutates_args=())
def noisy(h: Tensor) -> Tensor:
    return h + torch.rand_like(h)


torch.library.register_autograd("elle_fast_tests::noisy", lambda ctx, grad: grad)


def wrapped_mask(h: Tensor) -> Tensor:
    ones = torch.ones_like(h)
    mask: Any = F.dropout(TwoTensor(ones, ones.clone()), 0.5)
    out: Tensor = h * mask.a
    return out


IN_BLOCKS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "RReLU": lambda: nn.RReLU(),
    "a permutation": lambda: lambda h: h + torch.rand(len(h), 1, 1)[torch.randperm(len(h))],
    "normal of means": lambda: lambda h: torch.normal(h.detach(), 1.0) + h,
    "checkpoint": lambda: lambda h: checkpoint.checkpoint(F.dropout, h, use_reentrant=False),
    "compiled": lambda: torch.compile(nn.Dropout(0.5), backend="eager"),
    "an operation of another library": lambda: noisy,
    "a tensor that wraps others": lambda: wrapped_mask,
    "frames in the batch": lambda: frames,
    "frames in the batch, time first": lambda: frames_time_first,
    "heads in the batch": lambda: Attention(False, True),
    "a draw of five dimensions": lambda: (
        lambda h: F.dropout(h.transpose(0, 1)[..., None, None], 0.5)[..., 0, 0].transpose(0, 1)
    ),
    "halves of the batch": lambda: lambda h: torch.cat([F.dropout(part, 0.5) for part in h.chunk(2)]),
    "some rows": lambda: lambda h: torch.cat([F.dropout(h[::3], 0.5), h[:0]]).mean(0) + h,
    "weights": lambda: lambda h: F.linear(h, F.dropout(torch.ones(8 * BATCH, WIDTH), 0.5)).mean(-1, keepdim=True) + h,
    "a given output": lambda: lambda h: h + torch.rand(h.shape, out=torch.empty(h.shape)),
}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"triplets": 2},
    {"triplet_fraction": 0.5},
    {"points": "five-point", "triplet_fraction": 0.75},
    {"points": "elle-2p", "triplets": 2},
    {"points": "elle-2p", "triplet_fraction": 0.5},
    {"alpha": "argmax", "triplets": 2, "triplet_fraction": 0.5},
    {"loss_fn": lambda output, target: F.cross_entropy(output, target, reduction="none")},
]


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random(BATCH, STEPS, WIDTH, seed=1).to(dtype), labels(BATCH, CLASSES, seed=1)


def e_lin_of(model: nn.Module, eps: float, **options: Any) -> float:
    criterion, (x, y) = ELLELoss(eps, generator=rng(2), **options), data()
    torch.manual_seed(3)
    criterion(model, x, y).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return criterion.stats["e_lin"].item()


@pytest.mark.parametrize("name", LINEAR)
def test_e_lin_of_a_linear_model_is_zero(name):
    """In float32: a residual of logits of order 1 to 10 has roundings of 1e-6 at most; masks make it some 0.1."""
    assert e_lin_of(Net(LINEAR[name]()), 0.5, of="logits") < 1e-10


@pytest.mark.parametrize("name", OTHERS)
def test_e_lin_is_zero_where_the_points_are_one(name):
    """With eps = 0 the points of a triplet are one, and E_lin is the variance of what is drawn."""
    assert e_lin_of(Net(OTHERS[name]()), 0.0, of="logits") < 1e-10


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("options", OPTIONS, ids=shown)
def test_all_layouts_draw_alike(options, forward):
    assert e_lin_of(Net(nn.Dropout(0.5)), 0.0, forward=forward, **options) < 1e-10


@pytest.mark.parametrize(
    "name, options",
    [*((name, {}) for name in IN_BLOCKS), *(("compiled", options) for options in OPTIONS[1:5])],
    ids=shown,
)
def test_what_the_mode_cannot_repeat_is_passed_by_points(name, options):
    model, (x, y) = Net(IN_BLOCKS[name]()), data()
    criterion = ELLELoss(0.0, lam=30.0, generator=rng(2), **options)
    with pytest.warns(UserWarning, match=r"^model: its random layers .* have a pass each"):
        criterion(model, x, y).backward()
    assert criterion.linearity.random_layers.level == Level.BLOCKS
    assert criterion.stats["e_lin"].item() < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(model, x, y).backward()
    assert criterion.stats["e_lin"].item() < 1e-10


@pytest.mark.parametrize(
    "name, options",
    [
        *(("Dropout", options) for options in OPTIONS),
        *((name, OPTIONS[2]) for name in ("native_dropout", "attention, sequence first")),
    ],
    ids=shown,
)
def test_all_forward_modes_draw_the_same(name, options):
    """The loss and all gradients of the packed pass are those of a pass for each point, in float64 to its rounding."""
    x, y = data(torch.float64)
    results = []
    for forward in FORWARDS:
        model = Net(LINEAR[name]()).double()
        criterion = ELLELoss(0.5, lam=30.0, forward=forward, generator=rng(2), **options)
        torch.manual_seed(3)
        criterion(model, x, y)
        torch.manual_seed(4)
        loss = criterion(model, x, y)
        grads = grads_of(loss, model)
        results.append([loss.detach(), *grads, torch.rand(())])
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, another, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("forward", FORWARDS)
def test_under_autocast(forward):
    model, (x, y) = Net(nn.Dropout(0.5)), data()
    criterion = ELLELoss(0.0, forward=forward)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(model, x, y)
    loss.backward()
    assert criterion.stats["e_lin"].item() < 1e-10


class Seen(nn.Module):
    """Dropout that keeps the masks of each call."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.masks: list[Tensor] = []

    def forward(self, h: Tensor) -> Tensor:
        out = F.dropout(h, self.p)
        self.masks.append(out.detach() != 0)
        return out


def test_masks_are_the_samples_own_and_new_in_each_step():
    layer, (x, y) = Seen(0.3), data()
    model, criterion = Net(layer), ELLELoss(0.1)
    steps: list[list[Tensor]] = []
    for _ in range(2):
        torch.manual_seed(7)
        steps.append([])
        for _ in range(40):
            layer.masks.clear()
            criterion(model, x, y)
            blocks = layer.masks[-1].unflatten(0, (4, BATCH))
            assert all(torch.equal(blocks[0], block) for block in blocks[1:])
            steps[-1].append(blocks[0])
    first, again = map(torch.stack, steps)
    assert torch.equal(first, again)  # one seed, the same bits, whether the level was known or not
    assert len(first.flatten(1).unique(dim=0)) == 40
    assert len(first.transpose(0, 1).flatten(1).unique(dim=0)) == BATCH
    # Of 4,800 independent draws the mean is within 5 standard deviations of sqrt(0.3 0.7 / 4,800) = 0.0066.
    assert abs(first.float().mean().item() - 0.7) < 0.033


def test_all_parts_of_a_method_that_adds_e_lin():
    model, (x, y) = Net(nn.Dropout(0.5)), data()
    criterion = build("gat+elle", eps=0.0)
    for _ in range(2):
        criterion(model, x, y).backward()
    assert criterion.stats["e_lin"].item() < 1e-10


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_regulariser_alone(context):
    model, (x, y) = Net(nn.Dropout(0.5)), data()
    with context():
        assert LocalLinearity(0.0)(model, x, y).item() < 1e-10


@pytest.mark.parametrize("points", ["elle", "elle-2p"])
def test_light_steps(points):
    model, (x, y) = Net(nn.Dropout(0.5)), data()
    criterion = ELLELoss(0.0, adaptive=True, skip_below=1.0, points=points)
    for _ in range(2):
        criterion(model, x, y).backward()
        assert criterion.stats["e_lin"].item() < 1e-10
    assert criterion.stats["light_steps"] == 2


def test_a_model_without_random_layers_has_no_mode_and_no_more_passes(monkeypatch):
    monkeypatch.setattr(draws, "_Repeating", None)
    (x, y), calls = data(), []
    model = Net(nn.Dropout(0.5).eval())
    model.register_forward_hook(lambda *args: calls.append(len(args[2])))
    criterion = ELLELoss(0.1)
    for _ in range(2):
        criterion(model, x, y)
    assert calls == [BATCH, 4 * BATCH] * 2


def test_one_pass_is_thrown_away():
    (x, y), calls = data(), []
    model = Net(nn.Dropout(0.5))
    model.register_forward_hook(lambda *args: calls.append(len(args[2])))
    criterion = ELLELoss(0.1)
    for _ in range(3):
        criterion(model, x, y)
    assert calls == [BATCH, 4 * BATCH, 4 * BATCH] + [BATCH, 4 * BATCH] * 2
    with no_host_sync():
        criterion(model, x, y).backward()


def test_a_resumed_run_has_the_same_bits():
    """The pass that is thrown away moves no running statistics: a new criterion, which makes one, changes nothing."""
    results = []
    for resumed in (False, True):
        model, (x, y) = convnet(dropout=True), (random(BATCH, 3, 8, 8, seed=1), labels(BATCH, CLASSES, seed=1))
        criterion = ELLELoss(0.1)
        torch.manual_seed(5)
        criterion(model, x, y)
        loss = (ELLELoss(0.1) if resumed else criterion)(model, x, y)
        results.append([loss.detach(), *grads_of(loss, model), *model.buffers(), torch.rand(3)])
    assert all(map(torch.equal, *results))


def test_a_layer_that_begins_to_draw_is_seen():
    model, (x, y) = Net(nn.Dropout(0.5)), data()
    criterion = ELLELoss(0.0)
    for train in (False, True):
        model.train(train)
        criterion(model, x, y)
        assert criterion.stats["e_lin"].item() < 1e-10
        assert criterion.linearity.random_layers.level == int(train)


def test_points_that_the_model_changed_are_not_passed_again():
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x.mul_(2), 0.5)

    seen: list[Tensor] = []
    model, (x, y) = nn.Sequential(Doubling(), Net(nn.Identity())), data()
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().amax()))
    criterion = ELLELoss(0.0, attack="none")
    for _ in range(2):
        criterion(model, x, y)
    assert torch.stack(seen).max() == x.abs().amax()
    assert criterion.stats["e_lin"].item() < 1e-10


def test_attention_that_draws_in_its_kernel_is_computed_by_plain_operations():
    """Such a kernel is on a GPU only; here one takes its place on the CPU."""
    aten = torch.ops.aten

    def kernel(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, *_: Any, **__: Any) -> Any:
        out = F.dropout(v, dropout_p)
        empty = torch.empty(0)
        return out, empty, empty, empty, 0, 0, empty, empty, empty

    def attend(h: Tensor) -> Tensor:
        q = h[:, None]
        if torch.backends.cuda.flash_sdp_enabled():
            attended: Tensor = aten._scaled_dot_product_flash_attention(q.detach(), q.detach(), q.detach(), 0.5)[0][
                :, 0
            ]
            return h + attended
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)[:, 0]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_flash_attention", kernel, "CPU")
        model, (x, y) = Net(attend), data()
        criterion = ELLELoss(0.0, of="logits")
        for _ in range(2):
            criterion(model, x, y).backward()
    assert criterion.linearity.random_layers.level == Level.ATTENTION
    assert criterion.stats["e_lin"].item() < 1e-10
    assert torch.backends.cuda.flash_sdp_enabled()


def test_dropout_of_cudnn_is_known():
    assert draws._cudnn_draws(nn.Sequential(nn.LSTM(2, 2, 2, dropout=0.5)))
    assert not draws._cudnn_draws(nn.LSTM(2, 2, 2, dropout=0.5).eval())
    assert not draws._cudnn_draws(nn.LSTM(2, 2, 2))


@pytest.mark.parametrize(
    "blocks, alike, fits", [(1, True, True), (2, False, True), (2, True, False), (4, False, False)]
)
def test_a_graph_repeats_draws_in_one_pass_only(blocks, alike, fits):
    """While a CUDA graph is captured no state can be set; a mode needs none."""
    of = Draws(Level.ROWS, 2, None)
    passes = of.passes(lambda h: F.dropout(h, 0.5), [2] * blocks, [2] * blocks, torch.ones(2 * blocks, 3), alike=alike)
    with nullcontext() if fits else pytest.raises(RuntimeError, match=r"^model: a CUDA graph cannot repeat random"):
        assert [run(*inputs).shape for run, inputs in passes] == [(2, 3)] * blocks


@pytest.mark.parametrize("steps, width, level", [(3, 4 * BATCH, Level.ROWS), (4 * BATCH, WIDTH, Level.BLOCKS)])
@pytest.mark.filterwarnings("ignore:model. its random layers")
def test_sequences_whose_width_or_length_is_that_of_the_rows(steps, width, level):
    """torch's default layout, [T, N, E]: E = 4 B is told apart; T = 4 B cannot be."""
    torch.manual_seed(0)
    layer, last = nn.Dropout(0.5), nn.Linear(width, CLASSES)
    x, y = random(BATCH, steps, width, seed=1), labels(BATCH, CLASSES)
    criterion = ELLELoss(0.0, lam=30.0, attack="none", generator=rng(2))
    criterion(lambda h: last(layer(h.transpose(0, 1)).mean(0)), x, y)
    assert criterion.stats["e_lin"].item() < 1e-10
    assert criterion.linearity.random_layers.level == level


def test_native_dropout_that_does_not_train_draws_nothing():
    model = Net(lambda h: torch.native_dropout(h, 0.5, False)[0] + F.dropout(h, 0.5))
    plain = Net(lambda h: h + F.dropout(h, 0.5))
    outputs = []
    for each in (model, plain):
        criterion, (x, y) = ELLELoss(0.1, lam=30.0, attack="none", generator=rng(2)), data()
        for _ in range(2):
            torch.manual_seed(3)
            criterion(each, x, y)
        assert criterion.output is not None
        outputs.append(criterion.output)
    assert torch.equal(outputs[0], outputs[1])


def in_place() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5), nn.Linear(STEPS * WIDTH, CLASSES))


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_model_that_changes_its_input_draws_alike_from_the_first_step_on(forward):
    (x, y), model = data(), in_place()
    criterion = ELLELoss(0.0, lam=30.0, attack="none", forward=forward, generator=rng(2))
    for _ in range(3):
        criterion(model, x, y)
        assert criterion.stats["e_lin"].item() < 1e-10


@pytest.mark.parametrize("call", [lambda model: model, lambda model: model.forward], ids=["module", "method"])
def test_batch_norm_sees_each_step_once_after_a_validation(call):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(STEPS)
    model = nn.Sequential(norm, nn.Flatten(), nn.Dropout(0.5), nn.Linear(STEPS * WIDTH, CLASSES))
    (x, y), criterion = data(), ELLELoss(0.1, lam=30.0, attack="none", generator=rng(2))
    model.eval()
    criterion(call(model), x, y)
    model.train()
    for step in range(1, 4):
        criterion(call(model), x, y)
        assert norm.num_batches_tracked == step


def test_putting_buffers_back_leaves_the_graph_of_the_base_alone():
    """Its batch norm saved them for the backward pass, before E_lin's first pass met dropout and was thrown away."""
    x, target = random(BATCH, 3, 8, 8, seed=0), labels(BATCH, CLASSES)
    model, criterion = convnet(CLASSES, dropout=True), build("gat+elle", eps=0.1)
    loss = criterion(model, x, target)
    assert all(grad.isfinite().all() for grad in grads_of(loss, model))
    assert model.get_buffer("1.num_batches_tracked") == 4


def test_a_buffer_that_a_pass_replaces_is_put_back():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(STEPS * WIDTH, CLASSES)
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            out: Tensor = self.last(F.dropout(x.flatten(1), 0.5))
            return out

    (x, y), model = data(), Counting()
    criterion = ELLELoss(0.1, lam=30.0, attack="none", generator=rng(2))
    criterion(model, x, y)
    assert model.calls == 1
