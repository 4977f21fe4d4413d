"""Several texts in one row: trained as if each had a row of its own, wherever the model is cut."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoTokenizer

from fedsplit.assets import default_checkpoint
from fedsplit.data import Batch, DataSpec
from fedsplit.data.examples import Pair
from fedsplit.data.tokens import Encoded, pad, share_rows
from fedsplit.errors import FedsplitError
from fedsplit.execution import OptimizerSpec
from fedsplit.models import ModelSpec
from fedsplit.models.routes import distance, gradients, keeps_apart
from fedsplit.models.spec import usable_config
from fedsplit.models.tiny import example_inputs, packed_and_not, tiny_config
from fedsplit.plan import Route
from tests.execution.test_padding_on_link import ROUTES
from tests.tiny_split import BLOCKS, Cluster, gpt2, initial

PAIRS = [Pair(f"Return {'a list of ' * n}items", f"x = {n}, or None", 0) for n in (0, 1, 3, 6)]


def spec_of(model_type: str) -> ModelSpec:
    config = tiny_config(model_type, BLOCKS).to_diff_dict()
    config.pop("model_type")
    return ModelSpec(model_type=model_type, config=config, target_modules="all-linear")


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3_moe"])
def test_gradients_are_those_of_a_row_for_each_text_on_every_route(model_type: str) -> None:
    spec = spec_of(model_type)
    config = usable_config(tiny_config(model_type, BLOCKS), spec.task)
    together, alone = packed_and_not(example_inputs(config, spec.task)["input_ids"])
    expected = gradients(spec, config, Route.device_only(BLOCKS), alone)
    whole = gradients(spec, config, Route.device_only(BLOCKS), together)
    assert distance(whole, expected) < 1e-5
    for text in ROUTES.values():
        found = gradients(spec, config, Route.parse(text, BLOCKS), together)
        assert distance(found, whole) == 0, text


@pytest.mark.parametrize(
    ("model_type", "apart"), [("gpt2", True), ("llama", True), ("mamba", False), ("opt", False)]
)
def test_models_that_mix_texts_of_a_row_are_known(model_type: str, apart: bool) -> None:
    assert keeps_apart(spec_of(model_type)) == apart


def test_rows_hold_whole_pairs_with_positions_of_their_own_and_learn_what_they_would_alone() -> (
    None
):
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    single = pad(PAIRS, tokenizer, DataSpec(source="e2e", path="x", seq_len=64, loss_on="all"))
    spec = DataSpec(source="e2e", path="x", seq_len=64, loss_on="all", packing=True)
    packed = pad(PAIRS, tokenizer, spec)
    assert len(packed) < len(single)
    assert packed.counts.tokens == single.counts.tokens
    assert packed.counts.dropped == 0

    def texts(tensors: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
        found = []
        for row in range(len(tensors["input_ids"])):
            mask = tensors["attention_mask"][row].bool()
            ids, labels = (tensors[name][row][mask].tolist() for name in ("input_ids", "labels"))
            places = tensors.get("position_ids", torch.arange(64).expand(len(mask), -1))[row][mask]
            starts = [*(places == 0).nonzero()[:, 0].tolist(), len(ids)]
            for start, stop in pairwise(starts):
                assert places[start:stop].tolist() == list(range(stop - start))
                found.append((ids[start:stop], labels[start + 1 : stop]))
        return sorted(found)

    assert texts(packed.tensors) == texts(single.tensors)
    starts = (packed.tensors["position_ids"] == 0) & (packed.tensors["attention_mask"] == 1)
    assert (packed.tensors["labels"][starts] == -100).all()


def test_rows_are_filled_by_the_best_fit() -> None:
    rows: list[Encoded] = [([index] * n, [True] * n) for index, n in enumerate((3, 9, 5, 7, 1, 2))]
    lengths = [[len(tokens) for tokens, _ in group] for group in share_rows(rows, 10)]
    assert lengths == [[9, 1], [7, 3], [5, 2]]


def test_over_links_a_packed_turn_sends_no_padding_and_equals_one_that_is_never_split() -> None:
    spec, data = gpt2(), []
    adapters = initial(spec)
    draw = torch.Generator().manual_seed(0)
    for index in range(3):
        together, _ = packed_and_not(torch.randint(3, 60, (2, 8), generator=draw))
        mask, places = together["attention_mask"], together["position_ids"].clone()
        mask[1, 6:], places[1, 6:] = 0, torch.arange(2)
        together["labels"][1, 6:] = -100
        inputs = {**together, "position_ids": places}
        data.append(Batch(inputs, (2 * index, 2 * index + 1)))
    fit = OptimizerSpec(lr=1e-2)
    with Cluster(spec) as cluster:
        _, expected = cluster.train(Route.device_only(BLOCKS), data, adapters, fit)
        for text in ROUTES.values():
            route = Route.parse(text, BLOCKS)
            result, found = cluster.train(route, data, adapters, fit)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
            assert result.stats.up_payload_bytes == (1 + route.returns_home) * 3 * 14 * 32 * 4


def test_what_is_no_pair_cannot_share_rows() -> None:
    for given in ({"source": "stdlib"}, {"source": "digits"}, {"source": "text", "path": "x"}):
        with pytest.raises(FedsplitError, match="data.packing=True: must be false but for pairs"):
            DataSpec(packing=True, **given)
