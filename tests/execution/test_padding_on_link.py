"""Padding stays where it is: fewer bytes on every link, and the bits of training as before."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedsplit.data import Batch
from fedsplit.execution import OptimizerSpec, TurnResult
from fedsplit.execution.padding import kept_of
from fedsplit.models import ModelSpec, load
from fedsplit.models.routes import ignores_padding
from fedsplit.models.tiny import tiny_config
from fedsplit.plan import DEVICE, CodecPlan, Route, Segment
from tests.tiny_split import BLOCKS, TOKENS, VOCABULARY, Cluster, differing, gpt2, initial

ROUTES = {
    "open": "device[0:1] -> server[1:4]",
    "embeddings": "device[0:0] -> server[0:4]",
    "three tiers": "device[0:1] -> edge[1:3] -> cloud[3:4]",
    "U": "device[0:1] -> server[1:3] -> device[3:4]",
    "U over an edge": "device[0:1] -> edge[1:2] -> cloud[2:3] -> device[3:4]",
}
RIGHT, LEFT = (8, 3, 5), (3, 8, 6)  # tokens of the samples
FIT = OptimizerSpec(lr=1e-2, clip=0.1, accumulate=2)
HIDDEN_BYTES = 32 * 4


def padded(lengths: tuple[int, ...], left: bool, count: int = 4) -> list[Batch]:
    """Return mini-batches whose padding is of random tokens; on the left it predicts nothing."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for index in range(count):
        ids = torch.randint(0, VOCABULARY, (len(lengths), TOKENS), generator=draw)
        mask = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
        mask = mask.flip(1) if left else mask
        labels = ids.masked_fill(~mask, -100)
        labels[:, 1:].masked_fill_(~mask[:, :-1], -100)
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        owners = range(len(lengths) * index, len(lengths) * (index + 1))
        found.append(Batch(inputs, tuple(owners)))
    return found


def trained(
    route: Route, data: list[Batch], codec: CodecPlan | None = None, **options: object
) -> tuple[TurnResult, dict[str, Tensor]]:
    model = gpt2(dropout=0.1)
    spec = replace(FIT, **options)  # type: ignore[arg-type]
    with Cluster(model) as cluster:
        return cluster.train(route, data, initial(model), spec, codec=codec)


@pytest.fixture(params=["right", "left"])
def data(request: pytest.FixtureRequest) -> list[Batch]:
    left = request.param == "left"
    return padded(LEFT if left else RIGHT, left)


@pytest.fixture
def sent_whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr("fedsplit.execution.tier.kept_of", lambda *_: None)


@pytest.mark.parametrize("route", ROUTES)
def test_bits_are_those_of_unsplit_training_and_of_sending_all(
    route: str, data: list[Batch], sent_whole: Callable[[], None]
) -> None:
    path = Route.parse(ROUTES[route], BLOCKS)
    result, adapters = trained(path, data)
    tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in data)
    crossings = 1 + path.returns_home
    assert result.stats.up_payload_bytes == crossings * tokens * HIDDEN_BYTES
    assert result.stats.down_payload_bytes == (path.cuts[0] > 0 or path.returns_home) * (
        crossings * tokens * HIDDEN_BYTES
    )
    sent_whole()
    same, expected = trained(path, data)
    assert result.reports == same.reports
    assert differing(adapters, expected) == []
    padding = sum(int((batch.inputs["attention_mask"] == 0).sum()) for batch in data)
    saved = same.stats.up_bytes - result.stats.up_bytes
    assert saved == pytest.approx(crossings * padding * HIDDEN_BYTES, abs=16 * 3 * len(data))


def test_what_stands_in_padding_does_not_matter(data: list[Batch]) -> None:
    route = Route.parse(ROUTES["three tiers"], BLOCKS)
    _, expected = trained(route, data)
    others = []
    for batch in data:
        mask, ids = batch.inputs["attention_mask"], batch.inputs["input_ids"]
        other = torch.where(mask == 1, ids, (ids + 7) % VOCABULARY)
        others.append(replace(batch, inputs={**batch.inputs, "input_ids": other}))
    _, found = trained(route, others)
    assert differing(found, expected) == []


@pytest.mark.parametrize("route", ["open", "U", "three tiers"])
def test_steps_under_way_at_once_and_blocks_computed_again_change_no_bit(
    route: str, data: list[Batch]
) -> None:
    path = Route.parse(ROUTES[route], BLOCKS)
    result, expected = trained(path, data)
    other, found = trained(path, data, overlap=2, checkpointing=True)
    assert differing(found, expected) == []
    assert other.stats == result.stats


@pytest.mark.parametrize("route", ["open", "U"])
def test_codecs_spend_their_bytes_on_tokens_alone(route: str, data: list[Batch]) -> None:
    path = Route.parse(ROUTES[route], BLOCKS)
    whole = [
        replace(batch, inputs={**batch.inputs, "attention_mask": torch.ones(3, TOKENS).long()})
        for batch in data
    ]
    codec = CodecPlan({"name": "bf16"}, {"name": "topk", "keep": 0.25})
    part = sum(int(batch.inputs["attention_mask"].sum()) for batch in data) / (
        3 * TOKENS * len(data)
    )
    with_padding, without = (trained(path, each, codec)[0].stats for each in (whole, data))
    if route == "open":
        assert without.up_payload_bytes == with_padding.up_payload_bytes * part
        assert without.down_payload_bytes < with_padding.down_payload_bytes
    else:
        assert without.up_payload_bytes < with_padding.up_payload_bytes


LOSSLESS = {"name": "temporal", "key": {"name": "identity"}, "residual": {"name": "identity"}}
REMEMBERING = {
    "temporal": {"name": "temporal", "key": {"name": "bf16"}, "residual": {"name": "int8"}},
    "error_feedback": {"name": "error_feedback", "inner": {"name": "int8"}},
}


def shuffled(data: list[Batch]) -> list[Batch]:
    """Return the samples of `data` in mini-batches of other samples, cut to the longest of each."""
    rows = [
        ({name: value[row] for name, value in batch.inputs.items()}, batch.samples[row])
        for batch in data
        for row in range(len(batch.samples))
    ]
    order = sorted(range(len(rows)), key=lambda row: row * 5 % len(rows))
    found = []
    for start in range(0, len(rows), 3):
        mine = [rows[row] for row in order[start : start + 3]]
        masks = torch.stack([inputs["attention_mask"] for inputs, _ in mine])
        (used,) = torch.nonzero(masks.sum(0), as_tuple=True)
        inputs = {name: torch.stack([one[name][used] for one, _ in mine]) for name in mine[0][0]}
        found.append(Batch(inputs, tuple(sample for _, sample in mine)))
    return found


@pytest.mark.parametrize("route", ["embeddings", "three tiers", "U over an edge"])
def test_a_memory_without_loss_trains_what_boundaries_train(route: str, data: list[Batch]) -> None:
    """In three epochs of other mini-batches each, whose longest samples differ."""
    epochs = [*data, *shuffled(data), *shuffled(shuffled(data))]
    path = Route.parse(ROUTES[route], BLOCKS)
    _, expected = trained(path, epochs)
    _, found = trained(path, epochs, CodecPlan(LOSSLESS, LOSSLESS))
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-5


@pytest.mark.parametrize("route", ["open", "U"])
@pytest.mark.parametrize("way", ["uplink", "downlink"])
@pytest.mark.parametrize("name", REMEMBERING)
def test_codecs_that_remember_samples_send_their_tokens_alone(
    name: str, way: str, route: str, data: list[Batch]
) -> None:
    epochs, path = [*data, *shuffled(data)], Route.parse(ROUTES[route], BLOCKS)
    codec = CodecPlan(**{way: REMEMBERING[name]})
    result, _ = trained(path, epochs, codec)
    tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in data)
    crossings = 1 + path.returns_home
    width, scale = HIDDEN_BYTES // 4, 4
    first = {"temporal": width * 2, "error_feedback": width + scale}[name]
    sent = tokens * (first + width + scale)  # in the second epoch all are known
    whole = tokens * 2 * HIDDEN_BYTES
    up, down = (sent, whole) if way == "uplink" else (whole, sent)
    headers = 16 * len(epochs) * crossings
    assert result.stats.up_payload_bytes == pytest.approx(crossings * up, abs=headers)
    assert result.stats.down_payload_bytes == pytest.approx(crossings * down, abs=headers)


def test_padding_that_predicts_something_is_sent(sent_whole: Callable[[], None]) -> None:
    data = padded(LEFT, left=True)
    for batch in data:
        mask = batch.inputs["attention_mask"]
        batch.inputs["labels"][mask == 1] = batch.inputs["input_ids"][mask == 1]
    route = Route.parse(ROUTES["U"], BLOCKS)
    result, found = trained(route, data)
    assert result.stats.up_payload_bytes == 2 * len(data) * 3 * TOKENS * HIDDEN_BYTES
    sent_whole()
    _, expected = trained(route, data)
    assert differing(found, expected) == []


def test_evaluation_leaves_padding_out_as_well(data: list[Batch]) -> None:
    spec, route = gpt2(), Route.parse(ROUTES["open"], BLOCKS)
    with Cluster(spec) as cluster:
        result = cluster.evaluate(route, data, initial(spec))
        alone = cluster.evaluate(Route.device_only(BLOCKS), data, initial(spec))
    tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in data)
    assert result.stats.up_payload_bytes == tokens * HIDDEN_BYTES
    assert result.reports == alone.reports


@pytest.mark.parametrize(
    ("model_type", "right", "left"),
    [
        ("gpt2", True, True),
        ("llama", True, True),
        ("qwen3_moe", False, False),  # tokens that share an expert round together
        ("mixtral", False, False),
        ("recurrent_gemma", True, False),  # its convolution looks at what was before a text
    ],
)
def test_a_model_that_looks_at_padding_is_known(model_type: str, right: bool, left: bool) -> None:
    config = tiny_config(model_type, BLOCKS).to_diff_dict()
    config.pop("model_type")
    spec = ModelSpec(model_type=model_type, config=config, target_modules="all-linear")
    assert ignores_padding(spec, 1, left=False) == right
    assert ignores_padding(spec, 2, left=True) == left
    model = load(spec)
    for lengths, side, stays in ((RIGHT, False, right), (LEFT, True, left)):
        (batch,) = padded(lengths, side, count=1)
        where = kept_of(model, Segment(DEVICE, 0, 2), batch.inputs)
        assert (where is not None) == stays, "what leaves a device is not what was found"


def test_a_cut_s_tensors_that_are_not_by_token_go_whole() -> None:
    crossing = load(gpt2()).crossing(1)
    where = torch.ones(2, 3, dtype=torch.bool)
    assert crossing.kept(where) == (where,)
    assert crossing.kept(None) == ()
    forms = (replace(crossing.forms[0], axes=crossing.forms[0].axes[1:]), *crossing.forms)
    assert replace(crossing, forms=forms).kept(where) == (None, where)
