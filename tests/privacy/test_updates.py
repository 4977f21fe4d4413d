"""Tokens of a turn from the change of its adapters: exact where it can be, better than guessing."""

import pytest
import torch
from torch import Tensor

from fedsplit.assets import default_checkpoint
from fedsplit.data import Batch
from fedsplit.execution import OptimizerSpec, train_turn
from fedsplit.models import ModelSpec, SplitModel, load
from fedsplit.plan import Route
from fedsplit.privacy.updates import FirstInputs, UpdateReader, tokens_in_span

ROUTE = Route.device_only(6)
SGD = OptimizerSpec(name="sgd", lr=1.0, weight_decay=0.0)
VOCABULARY = 2048


@pytest.fixture(scope="module")
def model() -> SplitModel:
    return load(ModelSpec(source=str(default_checkpoint()), target_modules="all-linear"))


@pytest.fixture(scope="module")
def inputs(model: SplitModel) -> FirstInputs:
    found = FirstInputs.of(model)
    assert found is not None
    return found


def trained_before(model: SplitModel) -> dict[str, Tensor]:
    """Return adapters as they are in later rounds: a fresh B is zero, and A gets no gradient."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: 0.02 * torch.randn(value.shape, generator=draw) if ".lora_B" in name else value
        for name, value in model.adapters(ROUTE.segments[0]).items()
    }


def batch(ids: Tensor) -> Batch:
    fields = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return Batch(fields, tuple(range(len(ids))))


def change(model: SplitModel, inputs: FirstInputs, batches: list[Batch]) -> Tensor:
    start = trained_before(model)
    done = train_turn(model, ROUTE, batches, adapters=start, optimizer=SGD, seed=0)
    return inputs.change(start, done.adapters)


def test_what_a_token_looks_like_is_what_the_first_layers_read(
    model: SplitModel, inputs: FirstInputs
) -> None:
    ends = {name.rsplit(".", 3)[1] for name in inputs.names}
    assert ends == {"q_proj", "k_proj", "v_proj"}
    block = model.model.get_submodule("model.layers.0.input_layernorm")
    embedded = model.model.get_input_embeddings()(torch.tensor([[5, 900]]))  # type: ignore[no-untyped-call,operator]
    expected = torch.nn.functional.normalize(block(embedded)[0].detach(), dim=-1)
    torch.testing.assert_close(inputs.vectors[[5, 900]], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_of_few_tokens_and_plain_descent_all_are_read_and_no_other(
    model: SplitModel, inputs: FirstInputs, steps: int
) -> None:
    """But for those that only end texts, on which no loss depends."""
    draw = torch.Generator().manual_seed(steps)
    alike = (inputs.vectors @ inputs.vectors.T).fill_diagonal_(0).amax(1)
    known = (alike < 0.8).nonzero().flatten()  # others were hardly ever trained, and look alike
    few = known[torch.randperm(len(known), generator=draw)[:12]]
    picks = torch.randint(0, 12, (steps, 2, 10), generator=draw)
    batches = [batch(few[each]) for each in picks]
    expected = torch.unique(few[picks[:, :, :-1]])
    found = tokens_in_span(inputs, change(model, inputs, batches))
    assert torch.equal(found, expected)


def test_of_more_tokens_than_rows_a_reader_names_more_than_is_usual(
    model: SplitModel, inputs: FirstInputs
) -> None:
    """Tokens are drawn evenly, so that what is usual tells nothing of a turn."""
    draw = torch.Generator().manual_seed(0)
    likely = torch.randperm(VOCABULARY, generator=draw)[:200]

    def turn() -> tuple[Tensor, Tensor]:
        ids = likely[torch.randint(0, 200, (2, 20), generator=draw)]
        return change(model, inputs, [batch(ids)]), torch.unique(ids[:, :-1])

    counts = torch.zeros(VOCABULARY)
    counts[likely] = 10
    reader = UpdateReader(inputs, [turn() for _ in range(8)], counts)
    read = usual = 0.0
    for _ in range(4):
        changed, tokens = turn()
        read += float(torch.isin(tokens, reader.read(changed, len(tokens))).double().mean())
        usual += float(torch.isin(tokens, reader.guess(len(tokens))).double().mean())
    assert read > 1.5 * usual
