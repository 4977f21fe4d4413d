"""Texts are what transformers writes with the same weights, after prompts as training had them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.data import DataSpec, load_device, prompt_tokens
from fedsplit.errors import FedsplitError
from fedsplit.execution.generation import Generation, generate
from fedsplit.models import ModelSpec, load
from fedsplit.plan import Segment

TEXT = DataSpec(source="text", path="x")
PAIRS = DataSpec(source="text", path="x", prompt_column="q", target_column="a", seq_len=48)
CHAT = DataSpec(source="chat", path="x", template="chatml", seq_len=64)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load(ModelSpec(source=str(tiny_checkpoint), r=2))


@pytest.fixture
def shaken(model):
    """Adapters that change something."""
    whole = model.adapters(Segment("device", 0, model.n_blocks))
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in whole.items()}


@pytest.mark.parametrize("prompt", ["the quick", "a"])
def test_greedy_is_what_transformers_writes(tiny_checkpoint, tokenizer, model, prompt):
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    ids = tokenizer(prompt, return_tensors="pt")
    expected = plain.generate(**ids, max_new_tokens=12, do_sample=False)
    (text,) = generate(model, tokenizer, TEXT, [prompt], how=Generation(max_new_tokens=12))
    length = ids["input_ids"].shape[1]
    assert text == tokenizer.decode(expected[0, length:], skip_special_tokens=True)


def test_adapters_count_and_prompts_do_not_disturb_each_other(tokenizer, model, shaken):
    how = Generation(max_new_tokens=8)
    prompts = ["the quick", "fox"]
    alone = [
        generate(model, tokenizer, TEXT, [prompt], how=how, adapters=shaken)[0]
        for prompt in prompts
    ]
    assert generate(model, tokenizer, TEXT, prompts, how=how, adapters=shaken) == alone


def test_draws_depend_on_the_seed_alone(tokenizer, model):
    def draw(seed: int) -> str:
        how = Generation(max_new_tokens=12, sample=True, seed=seed)
        return generate(model, tokenizer, TEXT, ["the"], how=how)[0]

    before = torch.random.get_rng_state()
    texts = [draw(seed) for seed in (1, 2, 3, 1)]
    assert texts[0] == texts[3]
    assert len(set(texts)) > 1
    assert torch.equal(torch.random.get_rng_state(), before), "training's draws are left alone"


def test_the_narrowest_draw_is_greedy(tokenizer, model):
    greedy = generate(model, tokenizer, TEXT, ["the"], how=Generation(max_new_tokens=8))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        how = Generation(max_new_tokens=8, sample=True, seed=5, **narrow)
        assert generate(model, tokenizer, TEXT, ["the"], how=how) == greedy, narrow


@pytest.mark.parametrize(
    ("spec", "row"),
    [
        (PAIRS, '{"q": "the quick fox", "a": "runs away"}\n'),
        (CHAT, '{"prompt": "the quick fox", "completion": "runs away"}\n'),
    ],
    ids=["pairs", "chat"],
)
def test_a_prompt_is_what_stood_before_the_first_learnt_token(tmp_path, tokenizer, spec, row):
    file = tmp_path / "rows.jsonl"
    file.write_text(row * 4)
    local = DataSpec(**{**vars(spec), "partition": "local"})
    data = load_device(local, tokenizer, device=0, n_devices=1, seed=0, path=file)
    sample = data.train.select([0])
    first = int((sample["labels"][0] != -100).nonzero()[0])
    asked = prompt_tokens(tokenizer, local, "the quick fox")
    assert asked == sample["input_ids"][0, :first].tolist()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be from 1"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"seed": -1}, "seed=-1: must be from 0"),
        ({"seed": 2**63}, f"seed={2**63}: must be from 0 to 2\\^63 - 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(values, complaint):
    with pytest.raises(FedsplitError, match=complaint):
        Generation(**values)


def test_an_empty_prompt_is_refused(tokenizer, model):
    with pytest.raises(FedsplitError, match="prompt=''"):
        generate(model, tokenizer, TEXT, [""], how=Generation())
