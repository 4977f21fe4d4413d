"""What is exact where: every option of a recipe on every kind of route against the unsplit loop.

The oracle is a loop over the unsplit PEFT model with torch's and transformers' own parts: it knows
nothing of cuts, links and shares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from fedsplit.data import Batch
from fedsplit.errors import FedsplitError
from fedsplit.execution import OptimizerSpec
from fedsplit.execution.tier import Tier
from fedsplit.models import load
from fedsplit.plan import Route
from fedsplit.transport import LinkError, OpenRequest, TurnBounds
from tests.tiny_split import (
    BLOCKS,
    Cluster,
    batches,
    checkpoint,
    differing,
    gpt2,
    initial,
    plain_peft,
    there,
)

ROUTES = [
    "device[0:4]",
    "device[0:0] -> server[0:4]",
    "device[0:1] -> server[1:4]",
    "device[0:3] -> server[3:4]",
    "device[0:1] -> edge[1:3] -> cloud[3:4]",
    "device[0:1] -> server[1:3] -> device[3:4]",
    "device[0:1] -> edge[1:2] -> cloud[2:3] -> device[3:4]",
]
PLAIN = OptimizerSpec(lr=1e-2, weight_decay=0.1)
CLIPS = {"clip": 1e-2}  # below the norm of every step here
RECIPES = {
    "cosine": {"schedule": "cosine", "warmup": 0.4},
    "linear": {"schedule": "linear", "warmup": 1},
    "clip": CLIPS,
    "accumulate": {"accumulate": 2},
    "smoothing": {"label_smoothing": 0.1},
    "checkpointing": {"checkpointing": True},
    "fedprox": {"proximal_mu": 0.3, **CLIPS},
    "all": {
        **CLIPS,
        "schedule": "cosine",
        "warmup": 1,
        "accumulate": 2,
        "label_smoothing": 0.1,
        "checkpointing": True,
    },
}
STEPS = 5  # the last update of two mini-batches has one


def unsplit(
    model: Any, data: Sequence[Batch], spec: OptimizerSpec
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses and adapters of a plain loop: sums over targets, one division each step."""
    trained = [item for item in model.parameters() if item.requires_grad]
    start = [item.detach().clone() for item in trained]
    optimizer = torch.optim.AdamW(trained, lr=spec.lr, weight_decay=spec.weight_decay)
    groups = [data[i : i + spec.accumulate] for i in range(0, len(data), spec.accumulate)]
    warmup = spec.warmup if spec.warmup >= 1 else -(-spec.warmup * len(groups) // 1)
    scheduler = get_scheduler(spec.schedule, optimizer, int(warmup), len(groups))
    losses = []
    model.train()
    for group in groups:
        wanted = [there(batch)["labels"][:, 1:].flatten() for batch in group]
        targets = sum(int((labels != -100).sum()) for labels in wanted)
        for batch, labels in zip(group, wanted, strict=True):
            scores = model(**there(batch)).logits[:, :-1].flatten(0, 1)
            summed = cross_entropy(
                scores, labels, reduction="sum", label_smoothing=spec.label_smoothing
            )
            (summed / targets).backward()
            losses.append(float(summed.detach() / (labels != -100).sum()))
        for parameter, before in zip(trained, start, strict=True):
            parameter.grad += spec.proximal_mu * (parameter.detach() - before)
        if spec.clip is not None:
            assert torch.nn.utils.clip_grad_norm_(trained, spec.clip) > spec.clip
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses, {n: value.cpu() for n, value in get_peft_model_state_dict(model).items()}


def furthest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any value."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_what_the_unsplit_loop_trains_on_every_route(
    name: str, tiny_checkpoint: Path
) -> None:
    model = checkpoint(tiny_checkpoint)
    spec = replace(PLAIN, **RECIPES[name])
    adapters, data = initial(model), batches(STEPS)
    losses, expected = unsplit(plain_peft(model, adapters), data, spec)
    assert furthest(expected, adapters) > 1e-3, "there must be something to compare"
    with Cluster(model) as cluster:
        for text in ROUTES:
            result, found = cluster.train(Route.parse(text, BLOCKS), data, adapters, spec)
            assert [report.loss for report in result.reports] == pytest.approx(losses, abs=1e-6)
            assert furthest(found, expected) < 2e-6, text


@pytest.mark.parametrize("text", ROUTES[2:])
def test_checkpointing_changes_no_bit_also_with_dropout(text: str) -> None:
    model, route = gpt2(dropout=0.2), Route.parse(text, BLOCKS)
    adapters, data = initial(model), batches(3)
    with Cluster(model) as cluster:
        kept, expected = cluster.train(route, data, adapters, PLAIN)
        again, found = cluster.train(route, data, adapters, replace(PLAIN, checkpointing=True))
    assert again.reports == kept.reports
    assert differing(found, expected) == []


def test_a_branch_computes_again_with_its_own_adapters_whoever_ran_since() -> None:
    """Between its passes another branch has trained on the same backbone, and one was evaluated."""
    model, (batch,) = load(gpt2(dropout=0.2)), batches(1)
    segment, adapters = Route.two_tier(BLOCKS, 3).segments[0], initial(gpt2())
    doubled = {name: 2 * value for name, value in adapters.items()}
    norms = []
    for again in (False, True):
        spec = replace(PLAIN, checkpointing=again, clip=1.0)
        tiers = [Tier(model, [segment], values, spec, 0) for values in (adapters, doubled)]
        produced = [tier.forward(segment, batch.inputs) for tier in tiers]
        Tier(model, [segment], doubled, None, 0).forward(segment, batch.inputs)
        for tier, boundary in zip(tiers, produced, strict=True):
            tier.backward(boundary, [torch.ones_like(item) for item in boundary.tensors])
        norms.append([tier.norm() for tier in tiers])
    assert norms[0] == norms[1]
    assert norms[0][0] != norms[0][1]


def test_micro_batches_draw_dropout_of_their_own() -> None:
    model, (batch,) = gpt2(dropout=0.3), batches(1)
    with Cluster(model) as cluster:
        result, _ = cluster.train(
            Route.two_tier(BLOCKS, 2), [batch] * 3, initial(model), replace(PLAIN, accumulate=3)
        )
    assert len({report.loss for report in result.reports}) == 3


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "nadam", "adagrad", "muon", "adafactor"])
def test_every_optimizer_and_its_schedule_are_the_same_split_and_whole(name: str) -> None:
    model, data = gpt2(), batches(3)
    spec = OptimizerSpec(name, lr=1e-2, schedule="cosine", warmup=1)
    adapters = initial(model)
    with Cluster(model) as cluster:
        _, whole = cluster.train(Route.device_only(BLOCKS), data, adapters, spec)
        _, split = cluster.train(Route.three_tier(BLOCKS, 1, 3), data, adapters, spec)
    assert differing(split, whole) == []


@pytest.mark.parametrize("kind", ["in-process", "grpc"])
def test_a_clipped_step_costs_one_number_each_way(kind: str) -> None:
    model, data, route = gpt2(), batches(4), Route.two_tier(BLOCKS, 2)
    adapters = initial(model)
    with Cluster(model, kind) as cluster:
        plain, _ = cluster.train(route, data, adapters, PLAIN)
        clipped, _ = cluster.train(route, data, adapters, replace(PLAIN, clip=1.0))
    for name in ("up_bytes", "down_bytes"):
        more = getattr(clipped.stats, name) - getattr(plain.stats, name)
        assert 0 < more <= 4 * 64, name
    assert clipped.stats.up_payload_bytes == plain.stats.up_payload_bytes


def test_a_schedule_over_the_run_goes_on_from_turn_to_turn_and_wave_to_wave() -> None:
    spec = OptimizerSpec(lr=1.0, schedule="cosine", warmup=2)
    whole = [spec.rate(update, 24) for update in range(24)]
    rounds = [spec.within(number, 3) for number in range(3)]
    waves = [one.within(number, 2) for one in rounds for number in range(2)]
    assert [one.rate(update, 4) for one in waves for update in range(4)] == whole
    assert whole[:3] == [0.0, 0.5, 1.0]
    assert whole[-1] < 0.01
    by_turn = replace(spec, schedule_over="turn")
    assert by_turn.within(2, 3).rate(1, 4) == by_turn.rate(1, 4)


BOUNDS = TurnBounds(steps=4)


class Liar:
    """What a device says over its link, one thing wrong."""

    def __init__(self, cluster: Cluster, spec: OptimizerSpec) -> None:
        self.route = Route.two_tier(BLOCKS, 2)
        tokens = cluster.open(self.route, initial(cluster.spec), spec, bounds=BOUNDS)
        self.stage, self.token = cluster.stage("server"), tokens["server"]
        self.link = cluster.link("server")
        self.link.open(OpenRequest(self.token, self.route, 1))
        self.model = load(cluster.spec)

    def step(self, **said: float) -> Any:
        (batch,) = batches(1)
        boundary = self.model.run(self.route.segments[0], batch.inputs)
        inputs = self.model.travelling(batch.inputs, self.route)
        return self.link.step(inputs, boundary, batch.samples, **said)


@pytest.mark.parametrize(
    ("norm", "refusal"),
    [
        (-1.0, "norm=-1.0: must be 0 to inf"),
        (float("nan"), "NaN is not a number"),
        (float("inf"), "Infinity is not a number"),
        (10**400, "norm"),
        (True, "norm=True: must be 0 to inf"),
        ("1", "norm='1': must be 0 to inf"),
        (1e-9, "must be at least"),
    ],
    ids=repr,
)
def test_a_norm_that_cannot_be_is_refused(norm: Any, refusal: str) -> None:
    with Cluster(gpt2()) as cluster:
        liar = Liar(cluster, replace(PLAIN, clip=1.0))
        assert liar.step().norm > 1e-3
        liar.link.update(norm)
        with pytest.raises(LinkError, match=refusal):
            liar.step()
        assert liar.stage.status(liar.token).state == "failed"


def test_a_norm_is_said_when_it_is_due_and_only_then() -> None:
    with Cluster(gpt2()) as cluster:
        silent = Liar(cluster, replace(PLAIN, clip=1.0))
        silent.step()
        with pytest.raises(LinkError, match="norm: must come before the next step"):
            silent.step()
        leaver = Liar(cluster, replace(PLAIN, clip=1.0))
        leaver.step()
        with pytest.raises(LinkError, match="close: must follow an update"):
            leaver.link.close()
        talker = Liar(cluster, PLAIN)
        assert talker.step().norm is None
        talker.link.update(5.0)
        with pytest.raises(LinkError, match="norm=5: must be absent"):
            talker.step()


@pytest.mark.parametrize(
    ("shares", "accumulate"),
    [((0.5,), 1), ((0.7, 0.7), 2), ((0.1, 0.1), 2), ((-0.5,), 2), ((1.5,), 2), ((0.5, None), 2)],
)
def test_shares_that_do_not_make_up_a_step_are_refused(
    shares: tuple[float | None, ...], accumulate: int
) -> None:
    with Cluster(gpt2()) as cluster:
        liar = Liar(cluster, replace(PLAIN, accumulate=accumulate))
        *before, last = [{} if share is None else {"share": share} for share in shares]
        for said in before:
            liar.step(**said)
        with pytest.raises(LinkError, match="share"):
            liar.step(**last)


def test_a_step_may_not_be_left_half_done() -> None:
    with Cluster(gpt2()) as cluster:
        liar = Liar(cluster, replace(PLAIN, accumulate=2))
        liar.step(share=0.5)
        with pytest.raises(LinkError, match="close: must follow an update"):
            liar.link.close()


def test_a_schedule_has_to_know_the_turns_steps() -> None:
    model = gpt2()
    with Cluster(model) as cluster, pytest.raises(FedsplitError, match="steps: must be given"):
        cluster.open(Route.two_tier(BLOCKS, 2), initial(model), replace(PLAIN, schedule="cosine"))
