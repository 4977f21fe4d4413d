"""All of PEFT's LoRA that is of each layer by itself is trained, saved and loaded as PEFT does."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks._ways import plain_gradients
from fedsplit.errors import FedsplitError, SettingsError
from fedsplit.models import ModelSpec, adapter_settings, check_route, load
from fedsplit.models.check import check_adapters
from fedsplit.models.lora import as_plain_lora, lora_config
from fedsplit.models.lora_fields import ELSEWHERE, FIELDS, REFUSED
from fedsplit.models.routes import compare, gradients
from fedsplit.models.spec import usable_config
from fedsplit.models.tiny import example_inputs, tiny_config
from fedsplit.plan import Route, Segment
from fedsplit.report.export import save_adapter

BLOCKS = 3
WHOLE = Segment("device", 0, BLOCKS)
ROUTES = (
    Route.two_tier(BLOCKS, 1),
    Route.three_tier(BLOCKS, 1, 2),
    Route.u_shaped(BLOCKS, 1, 2),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA by power iteration": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"1\.self_attn.v_proj": 3.5}},
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "embeddings whole": {"modules_to_save": ["embed_tokens", "norm"]},
    "bias": {"lora_bias": True},
}
TARGETS = ("q_proj", "v_proj", "embed_tokens")


def spec_of(folder: Path | None = None, **lora: Any) -> ModelSpec:
    whole = "embed_tokens" in lora.get("modules_to_save", ())
    no_embedding = lora.get("use_rslora") or "layers_to_transform" in lora or "lora_bias" in lora
    targets = TARGETS[:2] if whole or no_embedding else TARGETS
    source = {"model_type": "llama"} if folder is None else {"source": str(folder)}
    return ModelSpec(**source, r=4, target_modules=targets, lora=lora)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(tiny_config("llama", BLOCKS)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_plain_peft(name: str) -> None:
    spec = spec_of(**SETTINGS[name])
    config = usable_config(tiny_config("llama", BLOCKS), "causal-lm")
    inputs = example_inputs(config, "causal-lm")
    expected = plain_gradients(spec, config, inputs)
    assert expected
    for route in ROUTES:
        assert compare(expected, gradients(spec, config, route, inputs)) is None, str(route)
    fields = {name: value for name, value in config.to_diff_dict().items() if name != "model_type"}
    check_route(dataclasses.replace(spec, config=fields), ROUTES[1])


@pytest.mark.parametrize("name", SETTINGS)
def test_an_exported_adapter_gives_plain_peft_the_same_outputs(
    base: Path, tmp_path: Path, name: str
) -> None:
    """From segments that were loaded apart, after every value has moved."""
    spec = spec_of(base, **SETTINGS[name])
    model = load(spec)
    initial = model.adapters(WHOLE)
    parts = [load(spec, [segment]).adapters(segment) for segment in ROUTES[1].segments]
    joined = {name: value for part in parts for name, value in part.items()}
    assert compare(initial, joined) is None
    inputs = example_inputs(model.config, "causal-lm")
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        # What training starts from is the model itself.
        start = model.run(WHOLE, inputs).logits  # type: ignore[union-attr]
        if name != "orthogonal":
            torch.testing.assert_close(start, plain(**inputs).logits, rtol=1e-4, atol=1e-5)
    draw = torch.Generator().manual_seed(0)
    trained = {
        name: value + 0.1 * torch.randn(value.shape, generator=draw)
        for name, value in initial.items()
    }
    model.install({name: torch.nn.Parameter(value) for name, value in trained.items()})
    lora, saved = as_plain_lora(lora_config(spec, model.model), trained, initial)
    save_adapter(tmp_path, saved, lora, str(base))
    adapted = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        ours = model.run(WHOLE, inputs).logits  # type: ignore[union-attr]
        torch.testing.assert_close(ours, adapted(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_every_field_of_peft_s_is_handed_through_or_refused() -> None:
    """A new release of PEFT is looked at before its new fields are let in."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert {*FIELDS, *ELSEWHERE, *REFUSED} <= known
    for name in sorted(known - set(FIELDS)):
        with pytest.raises(SettingsError, match=rf"^lora\.{name}="):
            ModelSpec(model_type="llama", lora={name: 1})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_rslora": 1}, "lora.use_rslora=1: must be true or false"),
        ({"use_rslor": True}, "the nearest is lora.use_rslora"),
        ({"bias": "all"}, "lora.bias='all': must be absent: biases"),
        ({"init_lora_weights": "eva"}, "must be one of true, gaussian, orthogonal"),
        ({"init_lora_weights": False}, "must be one of true"),
        ({"init_lora_weights": "pissa_niter_"}, "must be one of true"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "another one with lora.use_dora"),
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern.q_proj=0: must be a finite"),
        ({"rank_pattern": {"(": 2}}, "lora.rank_pattern.(=2: must be under a regular"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "lora.alpha_pattern.q_proj=nan"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)) as caught:
        ModelSpec(model_type="llama", lora=lora)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lora",
    [
        {"rank_pattern": {"no_such": 2}},
        {"alpha_pattern": {"k_proj": 2.0}},
        {"modules_to_save": ["no_such"]},
        {"layers_to_transform": [0, BLOCKS]},
    ],
)
def test_settings_that_no_module_answers_to_are_refused(base: Path, lora: dict[str, Any]) -> None:
    """PEFT passes over them in silence."""
    with pytest.raises(FedsplitError, match=rf"lora\.{next(iter(lora))}="):
        check_adapters(spec_of(base, **lora), spec_of(base).load_config())


def _saved_by_peft(base: Path, folder: Path, **fields: Any) -> Path:
    plain = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], **fields)
    adapted = get_peft_model(plain, config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora" in name:
                value.add_(0.1 * torch.randn(value.shape))
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"rank_pattern": {"1.self_attn.q_proj": 2}}]
)
def test_training_starts_from_an_adapter_that_peft_saved(
    base: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    folder = _saved_by_peft(base, tmp_path, **fields)
    spec = ModelSpec(source=str(base), **adapter_settings(str(folder)))
    check_adapters(spec, spec.load_config())
    model = load(spec)
    inputs = example_inputs(model.config, "causal-lm")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        ours = model.run(WHOLE, inputs).logits  # type: ignore[union-attr]
        torch.testing.assert_close(ours, plain(**inputs).logits)
    route = ROUTES[0]
    for segment in route.segments:
        part = load(spec, [segment]).adapters(segment)
        assert all(torch.equal(value, model.trained()[name]) for name, value in part.items())


def test_an_adapter_of_another_model_or_kind_is_refused(base: Path, tmp_path: Path) -> None:
    folder = _saved_by_peft(base, tmp_path / "own")
    spec = ModelSpec(source=str(base), **adapter_settings(str(folder)))

    def check(**changes: Any) -> None:
        check_adapters(dataclasses.replace(spec, **changes), spec.load_config())

    with pytest.raises(FedsplitError, match="one with values for .*v_proj"):
        check(target_modules=("q_proj", "v_proj"))
    with pytest.raises(FedsplitError, match="must be finite, of shape"):
        check(r=4)
    with pytest.raises(FedsplitError, match="has no module in the model for .*layers.1"):
        check(lora={"layers_to_transform": [0]})
    with pytest.raises(FedsplitError, match="must be a folder with PEFT's adapter_config.json"):
        adapter_settings(str(tmp_path))
    other = _saved_by_peft(base, tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(FedsplitError, match="saved as plain LoRA"):
        adapter_settings(str(other))
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(FedsplitError, match="an adapter of LoRA; it is one of 'IA3'"):
        adapter_settings(str(folder))
