"""Clipping and noise on the device: on the wire, and in the gradients."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedsplit.errors import FedsplitError, SettingsError
from fedsplit.execution import Stage, compute, evaluate_turn, train_turn
from fedsplit.models import Boundary, load
from fedsplit.plan import DEVICE, Route
from fedsplit.privacy import Defence, PrivacySpec
from fedsplit.privacy.noise import clip_units
from fedsplit.transport import InProcessLink
from tests.tiny_split import OPTIMIZER, TOKENS, Cluster, batches, differing, gpt2, initial

OPEN, U = Route.two_tier(4, 2), Route.u_shaped(4, 1, 3)
NOISE = PrivacySpec(clip=1e-3, noise_multiplier=2.0, unit="token")


class Wire(InProcessLink):
    """A link that keeps the frames that go up."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.frames: list[bytes] = []

    def _send(self, frame: bytes) -> Callable[[], bytes]:
        self.frames.append(frame)
        return super()._send(frame)


def turn(
    privacy: PrivacySpec | None, route: Route = OPEN, train: bool = True, seed: int = 0
) -> tuple[list[bytes], dict[str, Tensor]]:
    """Run a turn of two mini-batches; return the frames that left, and all trained adapters."""
    spec, adapters = gpt2(), initial(gpt2())
    with Cluster(spec) as cluster:
        optimizer = OPTIMIZER if train else None
        token = cluster.open(route, adapters, optimizer=optimizer, seed=seed)["server"]
        wire = Wire(cluster.stage("server"))
        shared = {"adapters": adapters, "seed": seed, "link": wire, "token": token}
        model = compute(lambda: load(spec, route.on(DEVICE)))
        if not train:
            evaluate_turn(model, route, batches(2), privacy=privacy, **shared)
            return wire.frames, {}
        result = train_turn(
            model, route, batches(2), optimizer=OPTIMIZER, privacy=privacy, **shared
        )
        return wire.frames, result.adapters | cluster.stage("server").adapters(token)


def plain_boundary(route: Route) -> bytes:
    """Return the bytes of the first mini-batch's boundary as the device computes it."""
    model = load(gpt2())
    model.install({name: torch.nn.Parameter(value) for name, value in initial(gpt2()).items()})
    with torch.no_grad():
        boundary = model.run(route.segments[0], batches(1)[0].inputs)
    assert isinstance(boundary, Boundary)
    return boundary.tensors[0][batches(1)[0].inputs["attention_mask"].bool()].numpy().tobytes()


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("route", [OPEN, U], ids=["open", "U"])
def test_what_leaves_the_device_is_noised_before_it_is_on_the_wire(
    route: Route, train: bool
) -> None:
    boundary = plain_boundary(route)
    bare, _ = turn(None, route, train)
    assert any(boundary in frame for frame in bare)  # else the test would see nothing
    noised, _ = turn(NOISE, route, train)
    assert not any(boundary in frame for frame in noised)
    clipped, _ = turn(replace(NOISE, noise_multiplier=0.0), route, train)
    assert not any(boundary in frame for frame in clipped)


def test_gradients_that_go_up_are_noised_where_that_is_asked_for() -> None:
    hidden, _ = turn(None, U)
    noisy = PrivacySpec(gradient_clip=1e-3, gradient_noise_multiplier=1.0, unit="token")
    shown, _ = turn(noisy, U)
    kinds = [
        index for index, (a, b) in enumerate(zip(hidden, shown, strict=True)) if a[40:] != b[40:]
    ]
    assert len(kinds) >= 2
    boundary = plain_boundary(U)
    assert any(boundary in frame for frame in shown)  # the boundary itself is as it was


@pytest.mark.parametrize("route", [OPEN, U], ids=["open", "U"])
@pytest.mark.parametrize(
    "spec",
    [
        PrivacySpec(),
        PrivacySpec(clip=1e6, noise_multiplier=0.0),
        PrivacySpec(clip=1e6, unit="token", gradient_clip=1e6),
    ],
    ids=["none", "sample", "token"],
)
def test_without_noise_training_is_exact_again(spec: PrivacySpec, route: Route) -> None:
    _, without = turn(None, route)
    _, trained = turn(spec, route)
    assert differing(trained, without) == []


def test_a_boundary_is_clipped_to_its_norm_by_sample_and_by_token() -> None:
    tensor = torch.randn(3, TOKENS, 16) * torch.tensor([0.001, 1.0, 50.0]).reshape(3, 1, 1)
    (samples,) = clip_units([tensor], 4.0, 1)
    norms = samples.flatten(1).norm(dim=1)
    assert norms[1:].tolist() == pytest.approx([4.0, 4.0], rel=1e-6)
    assert torch.equal(samples[0], tensor[0])
    (tokens,) = clip_units([tensor], 4.0, 2)
    assert tokens.norm(dim=2).max() <= 4.0 * (1 + 1e-6)
    assert torch.equal(tokens[0], tensor[0])


def test_all_tensors_of_a_boundary_share_one_norm_and_integers_pass() -> None:
    mask = torch.ones(2, 4, dtype=torch.int64)
    parts = clip_units([torch.ones(2, 4, 3), mask, torch.ones(2, 8)], 1.0, 1)
    squares = parts[0].flatten(1).square().sum(1) + parts[2].square().sum(1)
    assert squares.tolist() == pytest.approx([1.0, 1.0])
    assert parts[1] is mask


def test_gradients_go_back_through_clipping_as_calculus_has_it() -> None:
    tensor = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda item: clip_units([item], 1.0, 1)[0], [tensor])
    zero = torch.zeros(2, 5, 3, requires_grad=True)
    clip_units([zero], 1.0, 1)[0].sum().backward()
    assert torch.equal(zero.grad, torch.ones_like(zero))


def test_noise_has_the_deviation_that_it_is_to_have_and_comes_from_the_seed() -> None:
    boundary = Boundary((torch.zeros(4, 100, 64),), "1")
    first = Defence(NOISE, 5).boundary(boundary, {}).tensors[0]
    assert first.std().item() == pytest.approx(2e-3, rel=0.02)
    assert torch.equal(Defence(NOISE, 5).boundary(boundary, {}).tensors[0], first)
    assert not torch.equal(Defence(NOISE, 6).boundary(boundary, {}).tensors[0], first)
    defence = Defence(NOISE, 5)
    defence.boundary(boundary, {})
    assert not torch.equal(defence.boundary(boundary, {}).tensors[0], first)
    system = replace(NOISE, randomness="system")
    again = [Defence(system, 5).boundary(boundary, {}).tensors[0] for _ in range(2)]
    assert not torch.equal(*again)


def test_noise_on_a_boundary_that_has_no_tokens_is_refused_by_token() -> None:
    with pytest.raises(FedsplitError, match=r"unit='?token'?: boundaries of shape \(2, 3, 4, 4\)"):
        Defence(NOISE, 0).boundary(Boundary((torch.zeros(2, 3, 4, 4),), "1"), {})


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("clip", 0.0, {}),
        ("clip", float("nan"), {}),
        ("clip", float("inf"), {}),
        ("noise_multiplier", -1.0, {"clip": 1.0}),
        ("noise_multiplier", float("inf"), {"clip": 1.0}),
        ("noise_multiplier", 1.0, {}),
        ("gradient_noise_multiplier", 1.0, {"clip": 1.0}),
        ("unit", "text", {}),
        ("delta", 0.0, {}),
        ("delta", 1.0, {}),
        ("budget", 0.0, {"clip": 1.0, "noise_multiplier": 1.0}),
        ("budget", 1.0, {"clip": 1.0}),
        ("randomness", "dice", {}),
    ],
)
def test_wrong_settings_are_refused(field: str, value: object, others: Mapping[str, float]) -> None:
    with pytest.raises(SettingsError, match=f"privacy.{field}="):
        PrivacySpec(**{**others, field: value})  # type: ignore[arg-type]
