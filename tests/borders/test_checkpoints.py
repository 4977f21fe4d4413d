"""Checkpoints that are not what they seem are refused by name, before anything starts.

Each is made from the shipped one. The table is what people brought to such tools and trained on,
most of it from random weights without a word.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fedsplit.apps.cli import main
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from fedsplit.assets import default_checkpoint
from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec, check_model, load
from fedsplit.models.tiny import tiny_config
from fedsplit.plan import Segment

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
LAYER = "model.layers.2.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4474768\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the shipped checkpoint."""
    return Path(shutil.copytree(default_checkpoint(), tmp_path / "checkpoint"))


def prefixed(prefix: str) -> Change:
    return lambda weights: {prefix + name: value for name, value in weights.items()}


def inside(old: str, new: str) -> Change:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def without(part: str) -> Change:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def instead(name: str, **parts: Tensor) -> Change:
    """Put ``parts`` (by the last part of their names) in place of the weight `name`."""
    stem = name.rpartition(".")[0]

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {key: value for key, value in weights.items() if key != name}
        return kept | {f"{stem}.{short}": value for short, value in parts.items()}

    return change


def beside(name: str, value: Tensor) -> Change:
    return lambda weights: weights | {name: value}


def ints(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int32)


WRONG_TENSORS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "torch.compile": (prefixed("_orig_mod."), ("_orig_mod.model", "torch.compile")),
    "compiled inside": (inside("model.", "model._orig_mod."), ("_orig_mod.", "torch.compile")),
    "DDP": (prefixed("module."), ("'module.'", "DataParallel")),
    "PEFT, unmerged": (prefixed("base_model.model."), ("base_model.model.", "merge_and_unload")),
    "PEFT, base layers": (inside("up_proj.", "up_proj.base_layer."), ("base_layer", "up_proj")),
    "a trainer's own prefix": (prefixed("student.net."), ("'student.net.'", "off the front")),
    "FSDP": (inside("layers.1.", "layers.1._fsdp_wrapped_module."), ("FSDP",)),
    "one layer absent": (without("layers.3."), ("lacks 9", "model.layers.3.")),
    "one weight absent": (without(LAYER), ("lacks 1", LAYER)),
    "a norm absent": (without("model.norm."), ("lacks 1", "model.norm.weight")),
    "embeddings (and tied head) absent": (without("embed_tokens"), ("lacks", "embed_tokens")),
    "one layer too many": (
        beside("model.layers.6.mlp.up_proj.weight", torch.ones(448, 160)),
        ("1 of its tensors are not in", "model.layers.6"),
    ),
    "a bias that the model lacks": (
        beside("model.layers.0.mlp.up_proj.bias", torch.ones(448)),
        ("not in LlamaForCausalLM", "up_proj.bias"),
    ),
    "a value head (TRL)": (beside("v_head.summary.weight", torch.ones(1, 160)), ("v_head",)),
    "adapters among the weights": (
        beside("model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(8, 160)),
        ("lora_A", "merge_and_unload"),
    ),
    "GPTQ": (
        instead(LAYER, qweight=ints(20, 448), qzeros=ints(2, 56), scales=torch.ones(2, 448).half()),
        ("up_proj.qweight", "quantised"),
    ),
    "int8, bitsandbytes": (
        instead(LAYER, weight=ints(448, 160).to(torch.int8), SCB=torch.ones(448)),
        ("up_proj.weight is I8", "quantised"),
    ),
    "uint8, four bits packed": (
        instead(LAYER, weight=ints(35840, 1).to(torch.uint8), absmax=torch.ones(1120)),
        ("up_proj.weight is U8", "quantised"),
    ),
    "float8": (
        instead(LAYER, weight=torch.ones(448, 160).to(torch.float8_e4m3fn)),
        ("up_proj.weight is F8_E4M3", "quantised"),
    ),
    "float8, in blocks": (
        instead(LAYER, weight=torch.ones(448, 160).to(torch.float8_e4m3fn),
                weight_scale_inv=torch.ones(4, 2)),
        ("is F8_E4M3", "quantised"),
    ),
    "scales of weights dequantised in place": (
        beside(LAYER.replace("weight", "weight_scale_inv"), torch.ones(4, 2)),
        ("weight_scale_inv", "quantised"),
    ),
    "integers without scales": (
        instead(LAYER, weight=ints(448, 160)), ("up_proj.weight is I32",)
    ),
    "another width": (instead(LAYER, weight=torch.ones(440, 160)), ("440x160, not 448x160",)),
    "transposed": (instead(LAYER, weight=torch.ones(160, 448)), ("160x448, not 448x160",)),
    "names that a terminal would obey": (
        beside("\x1b[31mred\n", torch.ones(1)), ("not in LlamaForCausalLM",)
    ),
    "nothing": (without(""), ("lacks",)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_are_not_the_model_s_own(folder: Path, case: str) -> None:
    change, expected = WRONG_TENSORS[case]
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, expected)


def cut_in_half(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def cut_in_its_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def emptied(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def sharded(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_a_pointer_among_its_shards(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].write_text(POINTER)


def changed_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        sharded(folder)
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return alter


def corrupt_index(folder: Path) -> None:
    sharded(folder)
    (folder / INDEX).write_text('{"weight_map": {"model.')


def replaced(name: str, text: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).write_text(text)

    return replace


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def configured(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def retokenised(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def an_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


WRONG_FILES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "half a file": (cut_in_half, (WEIGHTS, "cut off")),
    "part of a header": (cut_in_its_header, (WEIGHTS, "cut off")),
    "an empty file": (emptied, (WEIGHTS, "(0 bytes)")),
    "Git LFS: weights": (replaced(WEIGHTS, POINTER), (WEIGHTS, "Git LFS pointer", "git lfs pull")),
    "Git LFS: tokenizer": (replaced("tokenizer.json", POINTER), ("tokenizer.json", "git lfs pull")),
    "Git LFS: config": (replaced("config.json", POINTER), ("config.json", "git lfs pull")),
    "Git LFS: a shard": (with_a_pointer_among_its_shards, ("model-00002", "git lfs pull")),
    "a web page in place of the weights": (
        replaced(WEIGHTS, "<!DOCTYPE html><html></html>"), (WEIGHTS, "damaged")
    ),
    "a shard missing": (without_a_shard, ("1 of the", "model-00002")),
    "an index that is cut off": (corrupt_index, (INDEX, "damaged")),
    "an index without a map": (changed_index(lambda index: index.pop("weight_map")), (INDEX,)),
    "an index that names another file": (
        changed_index(lambda index: index["weight_map"].update(x="gone.safetensors")),
        ("missing", "gone.safetensors"),
    ),
    "an index that leads elsewhere": (
        changed_index(lambda index: index["weight_map"].update(x="../../x.safetensors")),
        ("outside its folder", "../../x.safetensors"),
    ),
    "only a pickle": (pickled, ("pytorch_model.bin", "save_pretrained")),
    "no weights": (removed(WEIGHTS), ("safetensors",)),
    "no configuration": (removed("config.json"), ("config",)),
    "a configuration that is cut off": (replaced("config.json", '{"model_'), ("config.json",)),
    "an unknown architecture": (configured(model_type="llamma"), ("llamma",)),
    "an adapter": (an_adapter, ("it is an adapter",)),
    "quantised, says the configuration": (
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("quantization_config", "gptq"),
    ),
    "a head of its own, says the configuration": (
        configured(tie_word_embeddings=False), ("lacks 1", "lm_head.weight", "without its head")
    ),
    "a layer more, says the configuration": (configured(num_hidden_layers=7), ("layers.6",)),
    "a layer less, says the configuration": (configured(num_hidden_layers=5), ("layers.5",)),
    "another width, says the configuration": (configured(intermediate_size=400), ("448x160",)),
    "no tokenizer": (removed("tokenizer.json"), ("tokenizer",)),
    "a tokenizer that is cut off": (replaced("tokenizer.json", "{"), ("tokenizer",)),
    "padding outside the embedding": (
        retokenised(pad_token="<pad>"), ("pad_token_id=2048", "below 2048")
    ),
    "fewer positions than tokens": (
        configured(max_position_embeddings=64), ("seq_len=128", "at most 64")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FILES)
def test_files_that_are_not_what_they_should_be(folder: Path, case: str) -> None:
    change, expected = WRONG_FILES[case]
    change(folder)
    refused(folder, expected)


def refused(folder: Path, expected: tuple[str, ...]) -> None:
    """Assert that the checkpoint is refused in one line that holds `expected`, within 5 CPU s."""
    started = time.process_time()
    with pytest.raises(FedsplitError) as caught:
        check_model(ModelSpec(source=str(folder)), seq_len=128)
    assert time.process_time() - started < 5
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 1000
    for text in expected:
        assert text in message


def test_the_shipped_checkpoint_fits(folder: Path) -> None:
    check_model(ModelSpec(source=str(folder)), seq_len=512)
    sharded(folder)
    check_model(ModelSpec(source=str(folder)), seq_len=512)


def test_the_command_refuses_in_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = prefixed("_orig_mod.")(load_file(folder / WEIGHTS))
    save_file(weights, folder / WEIGHTS)
    for command in ("run", "plan"):
        output = tmp_path / command
        assert main([command, f"model={folder}", f"output={output}"]) == 2
        said = capsys.readouterr()
        assert "torch.compile" in said.out + said.err
        assert "Traceback" not in said.out + said.err
        assert not output.exists()


@pytest.mark.parametrize("case", ["one layer absent", "GPTQ", "torch.compile", "float8"])
def test_a_tier_refuses_for_its_own_part(folder: Path, case: str) -> None:
    change, expected = WRONG_TENSORS[case]
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(FedsplitError) as caught:
        load(ModelSpec(source=str(folder)), [Segment("server", 2, 6)])
    assert all(text in str(caught.value) for text in expected if "lacks" not in text)


def test_a_tier_does_not_miss_what_others_hold(folder: Path) -> None:
    save_file(without("layers.3.")(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    load(ModelSpec(source=str(folder)), [Segment("device", 0, 3)])


HARMLESS = {
    "rotary tables of older releases": "model.layers.0.self_attn.rotary_emb.inv_freq",
    "the tied head, stored too": "lm_head.weight",
}


@pytest.mark.parametrize("case", HARMLESS)
def test_left_over_but_harmless(folder: Path, case: str) -> None:
    weights = load_file(folder / WEIGHTS)
    head = weights["model.embed_tokens.weight"].clone()
    more = {HARMLESS[case]: head if "head" in case else torch.ones(16)}
    save_file(weights | more, folder / WEIGHTS)
    check_model(ModelSpec(source=str(folder)))
    assert loss(folder) == loss(default_checkpoint())


def test_masks_that_gpt2_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("gpt2", 2)).save_pretrained(tmp_path)
    masks = {f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 8, 8).tril()
             for i in range(2) for name in ("bias", "masked_bias")}  # fmt: skip
    save_file(load_file(tmp_path / WEIGHTS) | masks, tmp_path / WEIGHTS)
    load(ModelSpec(source=str(tmp_path)))


def test_a_tied_weight_may_be_stored_under_either_name(folder: Path) -> None:
    weights = inside("model.embed_tokens", "lm_head")(load_file(folder / WEIGHTS))
    save_file(weights, folder / WEIGHTS)
    check_model(ModelSpec(source=str(folder)))
    assert loss(folder) == loss(default_checkpoint())


def test_a_head_that_differs_from_the_embeddings_is_not_tied_to_them(folder: Path) -> None:
    """The configuration says tied, the file has two: as transformers, we believe the file."""
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = 2 * weights["model.embed_tokens.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    ids = torch.arange(24)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, labels=ids).loss
    assert loss(folder) == pytest.approx(plain.item(), abs=1e-5)
    assert loss(folder) != loss(default_checkpoint())


def loss(folder: Path) -> float:
    ids = torch.arange(24)[None]
    model = load(ModelSpec(source=str(folder)))
    segment = Segment("device", 0, model.n_blocks)
    return model.run(segment, {"input_ids": ids, "labels": ids}).loss.item()  # type: ignore[union-attr]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a random image classifier of 1,000 classes."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
             "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    config = AutoConfig.for_model("vit", num_labels=1000, **sizes)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_new_classifier_may_be_asked_for(pictures: Path) -> None:
    spec = ModelSpec(
        source=str(pictures), task="image-classification", config={"num_labels": 5}, train="full"
    )
    check_model(spec)
    assert load(spec).model.classifier.weight.shape == (5, 32)


def test_a_backbone_gets_a_new_classifier(pictures: Path) -> None:
    weights = load_file(pictures / WEIGHTS)
    bare = {name: value for name, value in weights.items() if "classifier" not in name}
    pooler = {"vit.pooler.dense.weight": torch.ones(32, 32)}
    save_file(bare | pooler, pictures / WEIGHTS)
    spec = ModelSpec(source=str(pictures), task="image-classification", train="full")
    check_model(spec)
    load(spec)
    load(spec, [Segment("device", 0, 1)])
    del bare["vit.layernorm.weight"]
    save_file(bare, pictures / WEIGHTS)
    with pytest.raises(FedsplitError, match=r"vit\.layernorm\.weight"):
        check_model(spec)


SEEING = ["bert", "roberta", "electra", "xlnet"]


@pytest.mark.parametrize("model_type", SEEING)
def test_a_model_that_sees_the_future_is_no_causal_one(model_type: str) -> None:
    with pytest.raises(FedsplitError, match=rf"'{model_type}': must not see later tokens"):
        check_model(ModelSpec(model_type=model_type))


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "mamba", "minimax", "gpt_neox"])
def test_a_causal_model_is_one(model_type: str) -> None:
    check_model(ModelSpec(model_type=model_type), seq_len=16)


@pytest.mark.parametrize(
    ("model_type", "field", "most"),
    [("gpt2", "n_positions", 64), ("opt", "max_position_embeddings", 64),
     ("roberta", "max_position_embeddings", 62)],
)  # fmt: skip
def test_samples_must_not_be_longer_than_the_model(model_type: str, field: str, most: int) -> None:
    fields = {field: 64} | ({"is_decoder": True} if model_type == "roberta" else {})
    spec = ModelSpec(model_type=model_type, config=fields)
    check_model(spec, most)
    with pytest.raises(FedsplitError, match=f"seq_len={most + 1}: must be at most {most}"):
        check_model(spec, most + 1)
