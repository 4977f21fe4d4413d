"""A tier copied from a twin is the tier that would be built: same weights held, same names."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsplit.models import ModelSpec
from fedsplit.models.loading import assemble
from fedsplit.models.names import CAUSAL
from fedsplit.models.phantoms import is_phantom
from fedsplit.models.spec import usable_config
from fedsplit.models.split import SplitModel
from fedsplit.models.tiny import tiny_config
from fedsplit.models.twins import Twin
from fedsplit.models.weights import stir
from fedsplit.plan import Route

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("gpt2", {"lora": {"modules_to_save": ["lm_head"]}}),
    "full": ("llama", {"train": "full"}),
    "shared blocks": ("zamba", {"target_modules": ("q_proj", "v_proj"), "share_token_ids": True}),
    "inputs of every block": ("gemma3n_text", {"target_modules": ("q_proj",)}),
}


def state(model: SplitModel) -> dict[str, torch.Tensor]:
    return dict(model.model.state_dict(keep_vars=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tier", ["device", "edge", "cloud"])
def test_a_copied_tier_is_the_assembled_one(case: str, tier: str) -> None:
    model_type, fields = CASES[case]
    config = usable_config(tiny_config(model_type, 4), CAUSAL)
    spec = replace(ModelSpec(model_type=model_type), **fields)
    route = Route.three_tier(4, 1, 3)
    built = assemble(spec, config, route.on(tier), torch.device("cpu")).train()
    stir(built.model, spec.seed)
    copied = Twin(spec, config).tier(route.on(tier))
    expected, got = state(built), state(copied)
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert is_phantom(got[name]) == is_phantom(value), name
        assert got[name].requires_grad == value.requires_grad, name
        assert torch.equal(got[name], value), name
    (segment,) = route.on(tier)
    assert copied.adapter_names(segment) == built.adapter_names(segment)


def test_tiers_have_nothing_in_common_that_runs() -> None:
    """What a block leaves on its module must not be found there by another tier."""
    config = usable_config(tiny_config("llama", 4), CAUSAL)
    twin = Twin(ModelSpec(model_type="llama"), config)
    route = Route.two_tier(4, 2)
    device, server = (twin.tier(route.on(tier)).model for tier in ("device", "server"))
    parts = [
        [part for block in (0, 1) for part in model.model.layers[block].modules()]
        for model in (device, server)
    ]
    assert not any(a is b for a in parts[0] for b in parts[1])
    held = [[v for v in m.parameters() if not is_phantom(v)] for m in (device, server)]
    assert not any(a is b for a in held[0] for b in held[1])
