"""Fingerprints of bytes and tensors."""

import torch

from elle_fast._core.digests import digest_of


def test_a_digest_is_of_the_elements_in_logical_order():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = digest_of(b"a", images)
    assert found == digest_of(b"a", images.contiguous(memory_format=torch.channels_last))
    assert found == digest_of(b"a", images.clone().requires_grad_())
    changed = images.clone()
    changed[1, 2, 3, 4] += 2**-20
    others = [digest_of(b"b", images), digest_of(images), digest_of(b"a", changed), digest_of(b"a", images.bfloat16())]
    assert len({found, *others}) == 5
