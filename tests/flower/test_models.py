"""A node's model: loaded once, however its cut moves; what it computes does not depend on that."""

import pytest
import torch

from fedsplit.execution.tier import Tier
from fedsplit.flower.node import models
from fedsplit.flower.node.models import cached_model
from fedsplit.flower.tasks import Job
from fedsplit.models import SplitModel, load
from fedsplit.plan import DEVICE, Segment
from tests.tiny_split import BLOCKS, batches, gpt2, initial


def segments(cut: int, tail: int = 0) -> tuple[Segment, ...]:
    first = Segment(DEVICE, 0, cut)
    return (first, Segment(DEVICE, BLOCKS - tail, BLOCKS)) if tail else (first,)


def test_a_model_is_loaded_again_only_for_blocks_it_never_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[tuple[Segment, ...]] = []

    def counted(spec: object, held: tuple[Segment, ...], device: object) -> SplitModel:
        loaded.append(held)
        return load(gpt2(), held)

    monkeypatch.setattr(models, "load", counted)
    monkeypatch.setattr(models, "_kept", {})
    job = Job(model=gpt2(), n_devices=1, accelerator="cpu")
    for cut, tail, loads in ((2, 0, 1), (1, 0, 1), (2, 0, 1), (3, 0, 2), (1, 1, 3), (3, 1, 3)):
        model = cached_model(job, segments(cut, tail))
        assert model.holds(segments(cut, tail))
        assert len(loaded) == loads
    assert not load(gpt2(), segments(1)).holds(segments(2))


def test_blocks_that_are_held_beside_change_nothing() -> None:
    (segment,) = segments(1)
    (batch,) = batches(1)
    crossed = []
    for held in (segments(1), segments(3)):
        tier = Tier(load(gpt2(), held), [segment], initial(gpt2()), None, 0)
        crossed.append(tier.forward(segment, batch.inputs).tensors)
        assert tier.adapters().keys() == load(gpt2(), segments(1)).adapters(segment).keys()
    for one, other in zip(*crossed, strict=True):
        assert torch.equal(one, other)
