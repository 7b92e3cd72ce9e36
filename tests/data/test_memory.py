"""Split, Dataset, and batches: deterministic, resumable, and augmented as a per-sample loop would."""

import dataclasses
import random
import re
from typing import Any

import numpy as np
import pytest
import torch

from elle_fast._core.checks import describe
from elle_fast._core.seeds import derived_seed
from elle_fast.data import Dataset, Split, batches, batches_per_epoch, choose, in_order
from elle_fast.data.placement import Samples


def make_classes(n=12, channels=3, side=4, classes=3):
    images = torch.randint(256, (n, channels, side, side), generator=torch.Generator().manual_seed(5))
    return Split(images.to(torch.uint8), torch.arange(n) % classes)


def test_split_has_a_length_and_is_frozen():
    split = make_classes(7)
    assert len(split) == 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.labels = split.labels + 1


def test_split_rejects_other_tensors():
    images, labels = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    for other in (images.float(), images[:, 0], images[:0]):
        message = f"images: expected uint8 [N, C, H, W] with N >= 1, got {describe(other)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            Split(other, labels)
    for other in (labels.float(), labels[:, None], torch.zeros(3, dtype=torch.int64), labels.to("meta")):
        message = f"labels: expected int64 [2] on cpu, one for each image, got {describe(other)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            Split(images, other)


def test_split_to_moves_both_tensors():
    moved = make_classes().to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"


def test_subset_is_a_fixed_permutation_that_grows_at_its_end():
    split = make_classes(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(123)
    small, large = split.subset(4), split.subset(12)
    assert torch.equal(large.images, split.images[order])
    assert torch.equal(large.labels, split.labels[order])
    assert torch.equal(small.images, large.images[:4])
    assert torch.equal(small.labels, large.labels[:4])


def test_held_out_samples_are_the_first_of_the_fixed_permutation_and_the_rest_keeps_its_order():
    split = make_classes(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(123)
    for n in (1, 4, 11):
        rest, held_out = split.held_out(n)
        assert torch.equal(held_out.images, split.images[order[:n]])
        assert torch.equal(held_out.labels, split.labels[order[:n]])
        assert torch.equal(rest.images, split.images[order[n:].sort().values])
        assert torch.equal(rest.labels, split.labels[order[n:].sort().values])


@pytest.mark.parametrize("n", [0, 12, 2000])
def test_more_samples_than_there_are_cannot_be_held_out(n):
    with pytest.raises(ValueError, match=rf"n: expected an integer >= 1 and <= 11, got {n}"):
        make_classes(12).held_out(n)
    with pytest.raises(TypeError, match="n: expected an integer"):
        make_classes(12).held_out(2.0)


def test_subset_of_none_is_all_in_order():
    split = make_classes()
    assert torch.equal(split.subset(None).images, split.images)


@pytest.mark.parametrize(
    "limit,message",
    [(0, "got 0"), (-3, "got -3"), (13, "limit: expected an integer >= 1 and <= 12, got 13")],
)
def test_subset_rejects_limits_out_of_range(limit, message):
    with pytest.raises(ValueError, match=message):
        make_classes(12).subset(limit)


def test_mean_and_std_are_those_of_the_train_pixels():
    train, test = make_classes(9), make_classes(2)
    dataset = Dataset("made", train, test, ("a", "b", "c"), augment=False)
    pixels = train.images.double().div(255).transpose(0, 1).flatten(1)
    assert dataset.mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert dataset.std == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-12)


def test_std_of_a_constant_channel_is_floored():
    images = make_classes(6).images
    images[:, 1] = 77
    split = Split(images, torch.zeros(6, dtype=torch.int64))
    dataset = Dataset("made", split, split, ("a",), augment=False)
    assert dataset.mean[1] == pytest.approx(77 / 255)
    assert dataset.std[1] == 1e-3
    assert min(dataset.std[0], dataset.std[2]) > 0.1


def test_dataset_rejects_splits_of_different_image_sizes():
    with pytest.raises(ValueError, match=r"made: expected test images of the size .* \[3, 4, 4\], got \[3, 5, 5\]"):
        Dataset("made", make_classes(side=4), make_classes(side=5), ("a", "b", "c"), augment=False)


def test_a_digest_sees_every_part():
    split = make_classes(6)
    other = Split(split.images.clone(), split.labels.clone())
    assert split.digest() == other.digest()
    other.images[5, 0, 0, 0] ^= 1
    relabelled = Split(split.images, split.labels.flip(0) + 1)
    parts = [
        Dataset("made", split, split, ("a", "b"), augment=False),
        Dataset("made", other, split, ("a", "b"), augment=False),
        Dataset("made", split, other, ("a", "b"), augment=False),
        Dataset("made", split, relabelled, ("a", "b"), augment=False),
        Dataset("made", split, split, ("a", "c"), augment=False),
    ]
    assert len({dataset.digest() for dataset in parts}) == len(parts)
    assert len({each.digest() for each in (split, other, relabelled)}) == 3


# Batches


def make_split(n=23, channels=2, height=6, width=5):
    """Labels number the samples, so that a batch tells which images it holds."""
    images = torch.randint(1, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(3))
    return Split(images.to(torch.uint8), torch.arange(n))


def same(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def order(split, **arguments):
    return torch.cat([y for _, y in batches(split, 4, **arguments)]).tolist()


def test_a_batch_is_images_over_255_with_their_labels():
    split = make_split()
    for x, y in batches(split, 5, seed=0, epoch=0):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert torch.equal(x, split.images[y].float() / 255)


def test_pixels_end_at_exactly_0_and_1():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    ((x, _),) = batches(Split(images, torch.zeros(1, dtype=torch.int64)), 1, seed=0, epoch=0)
    assert x.min() == 0
    assert x.max() == 1
    assert torch.equal(x * 255, images.float())


@pytest.mark.parametrize(
    "n,batch_size,count,size", [(23, 5, 4, 5), (20, 5, 4, 5), (5, 5, 1, 5), (3, 5, 1, 3), (1, 1, 1, 1)]
)
def test_the_incomplete_batch_is_dropped_unless_it_is_the_only_one(n, batch_size, count, size):
    split = make_split(n)
    got = list(batches(split, batch_size, seed=0, epoch=0))
    assert batches_per_epoch(split, batch_size) == len(got) == count
    assert [len(y) for _, y in got] == [size] * count
    labels = torch.cat([y for _, y in got]).tolist()
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("augment", [False, True])
def test_same_arguments_same_bits(augment):
    split = make_split()
    arguments = {"seed": 7, "epoch": 3, "augment": augment}
    assert same(batches(split, 4, **arguments), batches(split, 4, **arguments))


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_resuming_gives_the_tail(start, augment):
    split = make_split()
    arguments = {"seed": 1, "epoch": 2, "augment": augment}
    whole = list(batches(split, 4, **arguments))
    assert len(whole) == 5
    assert same(batches(split, 4, start=start, **arguments), whole[start:])


def test_interleaved_epochs_do_not_disturb_each_other():
    split = make_split()
    alone = list(batches(split, 4, seed=0, epoch=0, augment=True))
    both = zip(batches(split, 4, seed=0, epoch=0, augment=True), batches(split, 4, seed=0, epoch=1), strict=True)
    assert same((first for first, _ in both), alone)


@pytest.mark.parametrize("augment", [False, True])
def test_no_global_random_state_is_read_or_written(augment):
    split = make_split()
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate()  # noqa: NPY002
    first = list(batches(split, 4, seed=0, epoch=0, augment=augment))
    after = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    with torch.random.fork_rng():
        torch.manual_seed(987)
        assert same(batches(split, 4, seed=0, epoch=0, augment=augment), first)


def test_order_depends_on_seed_and_epoch_but_not_on_augment():
    split = make_split()
    orders = {tuple(order(split, seed=seed, epoch=epoch)) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36
    assert order(split, seed=1, epoch=0, augment=True) == order(split, seed=1, epoch=0)


def test_pairs_do_not_collide():
    # 2**32 and 2**33 would be lost by a generator that keeps 32 bits of its seed.
    numbers = [-1, *range(100), 2**31, 2**32, 2**33, 2**63, 2**70]
    pairs = [(seed, epoch) for seed in numbers for epoch in range(10)]
    assert len({derived_seed(seed, epoch) for seed, epoch in pairs}) == len(pairs)
    assert derived_seed(1, 11) != derived_seed(11, 1) != derived_seed(111, 0)


@pytest.mark.parametrize("batch_size", [0, -4])
def test_batch_size_must_be_positive(batch_size):
    with pytest.raises(ValueError, match=f"batch_size: expected an integer >= 1, got {batch_size}"):
        batches_per_epoch(make_split(), batch_size)
    with pytest.raises(ValueError, match=f"batch_size: expected an integer >= 1, got {batch_size}"):
        batches(make_split(), batch_size, seed=0, epoch=0)


@pytest.mark.parametrize("start", [-1, 6])
def test_start_must_lie_in_the_epoch(start):
    with pytest.raises(ValueError, match=f"start: expected an integer >= 0 and <= 5, got {start}"):
        batches(make_split(), 4, seed=0, epoch=0, start=start)


@pytest.mark.parametrize("batch_size, sizes", [(10, [10, 10, 3]), (23, [23]), (100, [23])])
def test_in_order_are_all_samples_as_batches_gives_them(batch_size, sizes):
    split = make_split()
    got = list(in_order(split, batch_size))
    assert [len(y) for _, y in got] == sizes
    assert torch.cat([y for _, y in got]).tolist() == list(range(23))
    for x, y in batches(split, 4, seed=0, epoch=0):
        assert torch.equal(torch.cat([x for x, _ in got])[y], x)
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        in_order(split, 0)


# Augmentation


def crop_and_flip_one(image, top, left, flip):
    """The same for one sample, pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                row, column = i + top - 4, (width - 1 - j if flip else j) + left - 4
                if 0 <= row < height and 0 <= column < width:
                    out[c, i, j] = image[c, row, column]
    return out


def test_crop_and_flip_is_the_per_sample_loop():
    # All 81 offsets, flipped and not.
    grid = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
    images = make_split(len(grid)).images
    offsets = torch.tensor([[top, left] for top, left, _ in grid]).T
    flips = torch.tensor([flip for *_, flip in grid])
    out = Samples(torch.arange(len(images)), offsets, flips).placed(images)
    assert out.dtype == torch.uint8
    expected = [crop_and_flip_one(image, *draw) for image, draw in zip(images, grid, strict=True)]
    assert torch.equal(out, torch.stack(expected))


def which_draws(x, image):
    """All (top, left, flip) that turn `image` into `x`."""
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    height, width = image.shape[1:]
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)
    found = []
    for flip in (False, True):
        match = (windows.flip(-1) if flip else windows).eq(x[:, None, None]).all(-1).all(-1).all(0)
        found += [(top, left, flip) for top, left in match.nonzero().tolist()]
    return found


def test_augmented_batches_are_windows_drawn_evenly():
    split = make_split(1600, channels=1)
    (batch,) = batches(split, 1600, seed=0, epoch=0, augment=True)
    x = (batch[0] * 255).to(torch.uint8)
    draws = [which_draws(window, split.images[label]) for window, label in zip(x, batch[1], strict=True)]
    assert all(draws), "an output is no window of its padded input"

    # The 6x5 images are larger than the 4 zeros, so a window says its draw, but for the last column shared by two.
    first = torch.tensor([draw[0] for draw in draws if len(draw) == 1]).long()
    assert len(first) > 1200
    for column in (0, 1):
        assert first[:, column].unique().tolist() == list(range(9))
    tops = first[:, 0].bincount().double() / len(first)
    # Six standard deviations of a frequency of 1/9, and of 1/2.
    assert (tops - 1 / 9).abs().max() < 6 * (8 / 81 / len(first)) ** 0.5
    assert abs(first[:, 2].double().mean() - 0.5) < 6 * 0.5 / len(first) ** 0.5


def test_every_batch_has_draws_of_its_own():
    split = make_split(1)
    alike = Split(split.images.expand(64, -1, -1, -1), torch.zeros(64, dtype=torch.int64))
    first, second = (x for x, _ in batches(alike, 32, seed=0, epoch=0, augment=True))
    assert not torch.equal(first, second)
    draws = [[which_draws((image * 255).to(torch.uint8), split.images[0])[0] for image in x] for x in (first, second)]
    # Neither the offsets alone are repeated, nor the flips.
    for column in range(3):
        assert [draw[column] for draw in draws[0]] != [draw[column] for draw in draws[1]]


def test_without_augment_images_are_untouched_and_with_it_they_are_not():
    split = make_split()
    plain = torch.cat([x for x, _ in batches(split, 4, seed=0, epoch=0)])
    augmented = torch.cat([x for x, _ in batches(split, 4, seed=0, epoch=0, augment=True)])
    assert plain.shape == augmented.shape
    assert not torch.equal(plain, augmented)


def test_the_split_is_not_written_to():
    split = make_split()
    before = split.images.clone()
    for x, y in batches(split, 4, seed=0, epoch=0, augment=True):
        x.zero_()
        y.zero_()
    assert torch.equal(split.images, before)
    assert torch.equal(split.labels, torch.arange(23))


@pytest.mark.parametrize("n, batch_size, sizes", [(23, 8, [8, 8, 7]), (24, 8, [8, 8, 8]), (5, 8, [5]), (8, 8, [8])])
def test_the_incomplete_batch_is_kept_on_request_and_changes_no_other(n, batch_size, sizes):
    split = make_split(n)
    options: dict[str, Any] = {"seed": 1, "epoch": 2, "augment": True}
    kept = list(batches(split, batch_size, drop_last=False, **options))
    assert [len(y) for _, y in kept] == sizes
    assert batches_per_epoch(split, batch_size, drop_last=False) == len(sizes)
    for (x, y), (other_x, other_y) in zip(kept, batches(split, batch_size, **options), strict=False):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
    (x, y), *rest = batches(split, batch_size, drop_last=False, start=len(sizes) - 1, **options)
    assert not rest
    assert torch.equal(x, kept[-1][0])
    assert torch.equal(y, kept[-1][1])
    assert sum(y.sum() for _, y in kept) == split.labels.sum()


def test_an_incomplete_batch_is_shared_equally_or_refused():
    split = make_split(22)
    options: dict[str, Any] = {"seed": 1, "epoch": 0, "drop_last": False}
    (whole, _), shares = list(batches(split, 8, **options))[-1], []
    for rank in range(2):
        shares.append(list(batches(split, 8, rank=rank, ranks=2, **options))[-1][0])
    assert torch.equal(torch.cat(shares), whole)
    message = (
        "drop_last: expected True, or a last batch that 4 processes can share equally, got False with one of 6 samples"
    )
    with pytest.raises(ValueError, match=message):
        batches(split, 8, ranks=4, **options)
    assert len(list(batches(split, 8, seed=1, epoch=0, ranks=4))) == 2


@pytest.mark.parametrize("ranks, batch_size", [(1, 8), (2, 8), (4, 8), (23, 100)])
def test_the_shares_of_all_ranks_are_the_batch_of_one_process(ranks, batch_size):
    split = make_split()
    options: dict[str, Any] = {"seed": 3, "epoch": 1, "start": 1 if batch_size == 8 else 0, "augment": True}
    shares = [batches(split, batch_size, rank=rank, ranks=ranks, **options) for rank in range(ranks)]
    whole = list(batches(split, batch_size, **options))
    together = list(zip(*shares, strict=True))
    assert len(together) == len(whole) == 1
    for parts, batch in zip(together, whole, strict=True):
        assert {len(y) for _, y in parts} == {len(batch[1]) // ranks}
        assert same([tuple(map(torch.cat, zip(*parts, strict=True)))], [batch])


@pytest.mark.parametrize(
    "batch_size, rank, ranks, message",
    [
        (8, 0, 3, "expected batches that 3 processes can share equally, got 8 samples; choose a multiple of 3"),
        (2, 0, 4, "got 2 samples"),
        (100, 0, 2, "got 23 samples"),
        (8, 2, 2, "rank: expected an integer >= 0 and <= 1, got 2"),
        (8, -1, 2, "rank: expected an integer >= 0 and <= 1, got -1"),
    ],
)
def test_a_batch_that_cannot_be_shared(batch_size, rank, ranks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        batches(make_split(), batch_size, seed=0, epoch=0, rank=rank, ranks=ranks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_hold_the_same_samples():
    split = make_split()
    there = list(batches(split.to("cuda"), 4, seed=0, epoch=0, augment=True))
    for (x, y), (x_there, y_there) in zip(batches(split, 4, seed=0, epoch=0, augment=True), there, strict=True):
        assert x_there.device.type == y_there.device.type == "cuda"
        assert torch.equal(y, y_there.cpu())
        # A GPU multiplies by 1/255 where a CPU divides by 255.
        torch.testing.assert_close(x, x_there.cpu(), rtol=2**-22, atol=0)
        assert x_there.max() <= 1


# Whatever torch's default device is, data stay where they are, and draws are the same.


def results(split):
    dataset = Dataset("made", split, split, ("a", "b", "c"), augment=True)
    yield from (dataset.digest(), dataset.mean, dataset.std)
    for part in (split.subset(5), split.subset(None), split[choose(len(split), 3)], split[choose(len(split), None)]):
        yield part.digest()
    for augment in (False, True):
        for x, y in (*batches(split, 4, seed=3, epoch=2, augment=augment), *in_order(split, 5)):
            yield x.device.type, x.tolist(), y.tolist()


@pytest.mark.parametrize("way", ["context", "default"])
def test_another_default_device_changes_nothing(way):
    split = make_classes()
    expected = list(results(split))
    if way == "context":
        with torch.device("meta"):
            assert list(results(split)) == expected
        return
    torch.set_default_device("meta")
    try:
        assert list(results(split)) == expected
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda split: in_order(split.images), TypeError, "split: expected a Split, .* got a tensor"),
        (lambda split: in_order(None), TypeError, "split: expected a Split, .* got None"),  # type: ignore[arg-type]
        (lambda split: batches("digits", 4, seed=0, epoch=0), TypeError, "split: expected a Split, .* got 'digits'"),  # type: ignore[arg-type]
        (lambda split: batches_per_epoch([1, 2], 4), TypeError, r"split: expected a Split, .* got \[1, 2\]"),  # type: ignore[arg-type]
        (lambda split: batches(split, 4, seed="a", epoch=0), TypeError, "seed: expected an integer >= 0, got 'a'"),  # type: ignore[arg-type]
        (lambda split: batches(split, 4, seed=-1, epoch=0), ValueError, "seed: expected an integer >= 0, got -1"),
        (lambda split: batches(split, 4, seed=0, epoch=0.5), TypeError, "epoch: expected an integer >= 0, got 0.5"),  # type: ignore[arg-type]
        (lambda split: batches(split, 4, seed=0, epoch=0, augment=5), TypeError, "augment: expected True or False"),  # type: ignore[arg-type]
        (lambda split: batches(split, 4, seed=0, epoch=0, augment=None), TypeError, "augment: expected True or False"),  # type: ignore[arg-type]
        (lambda split: choose("a", None), TypeError, "n: expected an integer >= 0, got 'a'"),  # type: ignore[arg-type]
        (lambda split: choose(5, "a"), TypeError, "limit: expected an integer >= 1 and <= 5, got 'a'"),  # type: ignore[arg-type]
        (lambda split: Dataset("x", None, split, ("a",), True), TypeError, "train: expected a Split, .* got None"),  # type: ignore[arg-type]
        (lambda split: Dataset("x", split, 5, ("a",), True), TypeError, "test: expected a Split, .* got 5"),  # type: ignore[arg-type]
        (lambda split: Split(None, split.labels), TypeError, r"images: expected uint8 \[N, C, H, W\].* got None"),  # type: ignore[arg-type]
        (lambda split: Split(split.images, [0] * 12), TypeError, r"labels: expected int64 \[12\].* got \[0, 0"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_another_kind_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(make_classes())
