"""Split training computes what plain transformers + PEFT computes, to the last bit.

Every architecture here is one of the causal-LM mapping; `python -m benchmarks.conformance` tries
all of them.
"""

import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig

from benchmarks._ways import OPTIONS, plain_gradients
from benchmarks.conformance import examine, table
from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec
from fedsplit.models.routes import compare, gradients
from fedsplit.models.spec import usable_config
from fedsplit.models.tiny import example_inputs, narrow, tiny_config
from fedsplit.plan import Route

BLOCKS = 3
ROUTES = (
    Route.two_tier(BLOCKS, 2),
    Route.three_tier(BLOCKS, 1, 2),
    Route.u_shaped(BLOCKS, 1, 2),
)
TARGETS = {"mamba": ("in_proj", "x_proj"), "phi3": "all-linear"}
ARCHITECTURES = (
    "gpt2",
    "llama",
    "qwen3",
    "gemma3_text",
    "mistral",
    "mixtral",
    "phi3",
    "opt",
    "bloom",
    "falcon",
    "gpt_neox",
    "mamba",
)


def assert_equal_to_plain(
    spec: ModelSpec,
    config: PretrainedConfig,
    routes: tuple[Route, ...],
    checkpointing: bool = False,
) -> None:
    inputs = example_inputs(config, spec.task)
    expected = plain_gradients(spec, config, inputs)
    assert any(value is not None and value.abs().max() > 0 for value in expected.values())
    for route in routes:
        found = gradients(spec, config, route, inputs, checkpointing=checkpointing)
        trained = {name: value for name, value in found.items() if not name.endswith(STATISTICS)}
        assert compare(expected, trained) is None, str(route)


STATISTICS = ("running_mean", "running_var")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_adapter_gradients_equal_plain_peft(model_type: str) -> None:
    config = usable_config(tiny_config(model_type, BLOCKS), "causal-lm")
    spec = ModelSpec(model_type=model_type, target_modules=TARGETS.get(model_type))
    assert_equal_to_plain(spec, config, ROUTES)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_adapter_gradients_equal_plain_peft_with_dora_at_the_rank_s_root(model_type: str) -> None:
    config = usable_config(tiny_config(model_type, BLOCKS), "causal-lm")
    both = {"use_dora": True, "use_rslora": True}
    targets = TARGETS.get(model_type)
    spec = ModelSpec(model_type=model_type, target_modules=targets, lora=both)
    assert_equal_to_plain(spec, config, ROUTES[1:])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_blocks_computed_again_give_the_same_gradients(model_type: str) -> None:
    config = usable_config(tiny_config(model_type, BLOCKS), "causal-lm")
    spec = ModelSpec(model_type=model_type, target_modules=TARGETS.get(model_type))
    assert_equal_to_plain(spec, config, ROUTES[1:], checkpointing=True)


@pytest.mark.parametrize(
    "route",
    ["device[0:0] -> server[0:3]", "device[0:1] -> edge[1:1] -> cloud[1:3]"],
    ids=["embeddings only on the device", "an edge that only passes on"],
)
def test_segments_may_be_empty(route: str) -> None:
    config = usable_config(tiny_config("llama", BLOCKS), "causal-lm")
    spec = ModelSpec(model_type="llama")
    assert_equal_to_plain(spec, config, (Route.parse(route, BLOCKS),))


def image_config(model_type: str) -> PretrainedConfig:
    depth = {"num_hidden_layers": 3} if model_type == "vit" else {"depths": [1, 1, 1, 1]}
    return narrow(CONFIG_MAPPING[model_type](**depth, num_labels=5))


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize(
    ("model_type", "targets"), [("vit", ("q_proj", "v_proj")), ("resnet", ("convolution",))]
)
def test_image_classifiers(model_type: str, targets: tuple[str, ...], train: str) -> None:
    config = image_config(model_type)
    spec = ModelSpec(
        model_type=model_type, task="image-classification", train=train, target_modules=targets
    )
    n_blocks = 3 if model_type == "vit" else 4
    routes = (Route.two_tier(n_blocks, 1), Route.u_shaped(n_blocks, 1, n_blocks - 1))
    assert_equal_to_plain(spec, config, routes)


def test_full_training_on_every_route() -> None:
    config = usable_config(tiny_config("llama", BLOCKS), "causal-lm")
    assert_equal_to_plain(ModelSpec(model_type="llama", train="full"), config, ROUTES)


def test_full_training_with_tied_embeddings_needs_them_on_one_tier() -> None:
    config = usable_config(tiny_config("gpt2", BLOCKS), "causal-lm")
    spec = ModelSpec(model_type="gpt2", train="full")
    assert_equal_to_plain(spec, config, (Route.u_shaped(BLOCKS, 1, 2),))
    with pytest.raises(FedsplitError, match="tied"):
        gradients(spec, config, Route.two_tier(BLOCKS, 1), example_inputs(config, spec.task))


def test_blocks_that_share_keys_and_values_across_the_cut() -> None:
    """Gemma 3n's last blocks read the keys and values of earlier ones, and the token ids."""
    config = usable_config(tiny_config("gemma3n_text", 4), "causal-lm")
    spec = ModelSpec(
        model_type="gemma3n_text", target_modules=("q_proj", "v_proj"), share_token_ids=True
    )
    assert_equal_to_plain(spec, config, (Route.two_tier(4, 2), Route.three_tier(4, 1, 3)))


def test_blocks_that_share_their_weights() -> None:
    """Zamba's blocks 1 and 3 are one layer, with an adapter each."""
    config = usable_config(tiny_config("zamba", 4), "causal-lm")
    spec = ModelSpec(model_type="zamba", target_modules=("q_proj", "v_proj"), share_token_ids=True)
    assert_equal_to_plain(spec, config, (Route.two_tier(4, 2), Route.three_tier(4, 1, 3)))


ALL_IN_TURNS = "all in turns"  # what test_turns.py says
# What else may be said of an architecture that is not trained otherwise.
ROUNDED = {"longest", "packing"}


def how(model_type: str, option: str) -> str:
    """Return how equal split training is to plain PEFT's with one of the options."""
    verdict = examine(model_type, OPTIONS[option])
    assert verdict.built
    assert verdict.problem is None, verdict.problem
    if option in ROUNDED and verdict.how not in ("exact", "mixes"):
        assert float(verdict.how) < 1e-5
        return "rounded"
    return verdict.how


@pytest.mark.parametrize(
    ("model_type", "option", "expected"),
    [
        ("gpt2", "dropout", "exact"),
        ("gpt2", "accumulate", "exact"),
        ("mixtral", "no padding", "whole"),
        ("opt", "packing", "mixes"),
    ],
)
def test_options_are_exact_or_it_is_known_how_not(
    model_type: str, option: str, expected: str
) -> None:
    assert how(model_type, option) == documented()[model_type][option] == expected


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_option_is_exact_or_it_is_known_how_not(model_type: str, option: str) -> None:
    """As docs/training.md has it; whether a sum in another order rounds is the machine's."""
    found, told = how(model_type, option), documented()[model_type][option]
    told = "rounded" if re.match(r"\de-\d\d", told) else told
    assert found == told or {found, told} == {"exact", "rounded"}


def documented() -> dict[str, dict[str, str]]:
    """Return the table of docs/training.md: how equal an architecture is with each option."""
    page = Path(__file__).parents[2] / "docs" / "training.md"
    lines = page.read_text().partition("| architecture |")[2].partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0], row[1:], strict=True)) for row in cells[2:]}


def test_the_documented_table_is_of_these_architectures_and_options() -> None:
    table = documented()
    assert list(table) == sorted(ARCHITECTURES)
    assert all(list(row) == [*OPTIONS, ALL_IN_TURNS] for row in table.values())
    allowed = {"longest", "packing", ALL_IN_TURNS}
    for row in table.values():
        for option, cell in row.items():
            rounds = float(cell) < 1e-5 if re.match(r"\de-\d\d", cell) else False
            assert cell in {"exact", "whole", "mixes"} or (rounds and option in allowed)


def test_the_table_has_a_column_for_each_option() -> None:
    found = {name: {"gpt2": examine("gpt2", OPTIONS[name])} for name in ("plain", "dora")}
    assert table(found) == [
        "| architecture | plain | dora |",
        "|---|---|---|",
        "| gpt2 | exact | exact |",
    ]
