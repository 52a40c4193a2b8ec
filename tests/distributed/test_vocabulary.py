"""The cross entropy over parts of a vocabulary, by one process that has the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kempnerforge_torch.distributed import vocabulary
from kempnerforge_torch.training.loss import cross_entropy

VOCABULARY = 7


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("smoothing", "z_weight"), [(0.0, 0.0), (0.3, 0.01)])
def test_the_loss_and_its_gradient_are_those_of_the_whole(
    group: dist.ProcessGroup, smoothing: float, z_weight: float
) -> None:
    logits = torch.randn(2, 5, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30
    labels = torch.tensor([[0, 6, -100, 3, 3], [-100, -100, 1, 2, 5]])
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, count = vocabulary.split_cross_entropy(
        found, labels, vocab_size=VOCABULARY, group=group, smoothing=smoothing, z_weight=z_weight
    )
    whole, whole_count = cross_entropy(expected, labels, smoothing=smoothing, z_weight=z_weight)
    loss.backward()
    whole.backward()
    assert found.grad is not None
    assert expected.grad is not None
    assert count == whole_count
    torch.testing.assert_close(loss, whole, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("label", [-1, VOCABULARY])
def test_an_unknown_label_is_refused_or_gives_nan(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, label: int
) -> None:
    """NaN where, as on an accelerator, the host does not look at values."""
    logits, labels = torch.zeros(1, 2, VOCABULARY), torch.tensor([[2, label]])
    with pytest.raises(ValueError, match=rf"^labels = {label}: ids must be in \[0, 7\) or -100; 1 of 2 are not$"):
        vocabulary.split_cross_entropy(logits, labels, vocab_size=VOCABULARY, group=group)
    monkeypatch.setattr(vocabulary, "check_ids", lambda *_: None)
    assert vocabulary.split_cross_entropy(logits, labels, vocab_size=VOCABULARY, group=group)[0].isnan()
