"""Routes are tried out before they are used, and refused with the cuts that are possible."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec, check_route, possible_cuts
from fedsplit.models.routes import compare
from fedsplit.models.tiny import narrow, tiny_config
from fedsplit.plan import Route


def fields(model_type: str, n_blocks: int) -> dict[str, Any]:
    found = tiny_config(model_type, n_blocks).to_diff_dict()
    return {name: value for name, value in found.items() if name != "model_type"}


def test_a_wide_model_is_tried_as_a_narrow_one_of_equal_depth() -> None:
    spec = ModelSpec(model_type="gpt2")
    small = narrow(spec.load_config())
    assert (small.n_layer, small.n_embd, small.vocab_size) == (12, 32, 128)
    check_route(spec, Route.three_tier(12, 3, 8))


def test_token_ids_are_shared_only_on_request() -> None:
    """Gemma 3n gives every block an embedding of the token ids."""
    spec = ModelSpec(
        model_type="gemma3n_text",
        config=fields("gemma3n_text", 4),
        target_modules=("q_proj", "v_proj"),
    )
    with pytest.raises(FedsplitError, match="share_token_ids"):
        check_route(spec, Route.two_tier(4, 2))


def test_a_layer_shared_by_blocks_bounds_the_cut_only_where_it_is_trained() -> None:
    """Zamba's blocks 1 and 3 are one layer, and both read the embeddings.

    Adapters are put around each of the two, as plain PEFT does, so that LoRA is free to cut.
    """
    lora = ModelSpec(
        model_type="zamba",
        config=fields("zamba", 4),
        target_modules=("q_proj", "v_proj"),
        share_token_ids=True,
    )
    assert possible_cuts(lora) == (0, 1, 2, 3)
    with pytest.raises(FedsplitError, match="several places.*possible two-tier cuts: none$"):
        check_route(replace(lora, train="full"), Route.two_tier(4, 2))


def test_a_loss_that_spans_all_blocks_is_named() -> None:
    routers = fields("mixtral", 4) | {"output_router_logits": True}
    with pytest.raises(FedsplitError, match="possible.*: 0; config.output_router_logits=false"):
        check_route(ModelSpec(model_type="mixtral", config=routers), Route.two_tier(4, 2))


@pytest.mark.parametrize("model_type", ["llama", "gemma3n_text", "zamba"])
def test_possible_cuts_are_those_that_are_allowed_one_by_one(model_type: str) -> None:
    spec = ModelSpec(
        model_type=model_type,
        config=fields(model_type, 4),
        target_modules=("q_proj", "v_proj"),
        share_token_ids=True,
    )

    def allowed(cut: int) -> bool:
        try:
            check_route(spec, Route.two_tier(4, cut))
        except FedsplitError:
            return False
        return True

    assert list(possible_cuts(spec)) == [cut for cut in range(4) if allowed(cut)]


def test_routes_that_do_not_fit_are_refused() -> None:
    spec = ModelSpec(model_type="llama", config=fields("llama", 4))
    with pytest.raises(FedsplitError, match="4 blocks"):
        check_route(spec, Route.two_tier(5, 2))
    with pytest.raises(FedsplitError, match="at most 3"):
        check_route(spec, Route.two_tier(4, 4))


def test_models_without_a_list_of_blocks_are_refused() -> None:
    spec = ModelSpec(model_type="xlm", config=fields("xlm", 4))
    with pytest.raises(FedsplitError, match="cannot be cut"):
        check_route(spec, Route.two_tier(4, 2))


def test_comparison_is_exact() -> None:
    one = {"a": torch.ones(2), "b": None}
    assert compare(one, {"a": torch.ones(2), "b": None}) is None
    assert compare(one, {"a": torch.ones(2), "b": torch.zeros(2)}) is None
    assert "a differs" in str(compare(one, {"a": torch.ones(2) * (1 + 2**-23), "b": None}))
    assert "a differs" in str(compare(one, {"a": torch.ones(2) * float("nan"), "b": None}))
    assert "a differs" in str(compare(one, {"a": None, "b": None}))
    assert "one side only" in str(compare(one, {"a": torch.ones(2)}))
