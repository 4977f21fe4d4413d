"""Federated data: what each device holds, and the settings that are refused."""

import subprocess
import sys

import numpy as np
import pytest

from fedsplit.data import DataSpec, batches, load_data
from fedsplit.errors import FedsplitError
from fedsplit.mapping import from_mapping, to_mapping


def _held(data):
    """All examples of each device, for training and for testing."""
    return [
        (set(train.tolist()), set(test.tolist()))
        for train, test in zip(data.train_indices, data.test_indices, strict=True)
    ]


def test_devices_hold_different_themes_and_no_test_example_is_trained_on(tokenizer):
    data = load_data(DataSpec(seq_len=64), tokenizer, n_devices=4, seed=0)
    held = _held(data)
    assert all(train.isdisjoint(test) for train, test in held)
    everything = [train | test for train, test in held]
    assert sum(map(len, everything)) == len(set().union(*everything))
    for size, (train, test) in zip(data.sizes, held, strict=True):
        assert size == len(train)
        assert len(test) == pytest.approx(0.1 * (len(train) + len(test)), abs=1)


def test_short_texts_are_held_out_until_they_make_a_sample(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("\n\n".join(f"line {n:02}" for n in range(40)))
    data = load_data(
        DataSpec(source="text", path=str(tmp_path), seq_len=60), tokenizer, n_devices=2, seed=0
    )
    for device, (train, test) in enumerate(_held(data)):
        assert train.isdisjoint(test)
        assert len(data.test(device)) == 1
        # A paragraph has nine bytes with its end: 10 % of 20 are far too few, seven just enough.
        assert len(test) == 7


def test_samples_are_those_of_the_device_alone(tokenizer, tmp_path):
    for letter in "abc":
        (tmp_path / f"{letter}.txt").write_text("\n\n".join([letter * 9] * 12))
    spec = DataSpec(source="text", path=str(tmp_path), seq_len=5)
    data = load_data(spec, tokenizer, n_devices=3, seed=1)
    for device, letter in enumerate("abc"):
        for samples in (data.train(device), data.test(device)):
            texts = tokenizer.batch_decode(samples.select(range(len(samples)))["input_ids"])
            assert set("".join(texts).replace("<|end|>", "")) == {letter, "\n"}


def test_nothing_is_done_for_a_device_that_does_not_ask(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"line {n:02}" for n in range(40)))
    spec = DataSpec(source="text", path=str(tmp_path), seq_len=5)
    made = []

    class Counting(type(tokenizer)):
        def __call__(self, text, *args, **kwargs):
            made.extend([text] if isinstance(text, str) else text)
            return super().__call__(text, *args, **kwargs)

    counting = Counting(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    data = load_data(spec, counting, n_devices=4, seed=0)
    assert made == []
    assert (data.train(1).counts.read, data.test(1).counts.read) == (9, 1)
    assert len(set(made)) == 10


def test_the_division_depends_on_the_seed_alone(tokenizer):
    spec = DataSpec(partition="dirichlet", seq_len=64)
    first, same, other = (load_data(spec, tokenizer, 5, seed) for seed in (3, 3, 4))
    assert _held(first) == _held(same)
    assert _held(first) != _held(other)


def test_a_source_with_a_test_set_deals_it_out_whole(tokenizer, tmp_path):
    (tmp_path / "devset.csv").write_text("mr,ref\n" + "name[A],It is A.\n" * 30)
    (tmp_path / "testset_w_refs.csv").write_text("mr,ref\n" + "name[B],It is B.\n" * 11)
    spec = DataSpec(source="e2e", path=str(tmp_path), seq_len=32)
    data = load_data(spec, tokenizer, n_devices=4, seed=0)
    assert sum(data.sizes) == 30
    assert [len(data.test(device)) for device in range(4)] == [3, 3, 3, 2]


def test_the_default_data_need_no_reader_of_files():
    code = (
        "import sys; from fedsplit.data import DataSpec, load_data; "
        "load_data(DataSpec(), None, 4, 0); "
        "print({'datasets', 'pandas', 'pyarrow'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_max_samples_draws_some_of_the_examples():
    data = load_data(DataSpec(source="digits", max_samples=100, partition="iid"), None, 4, 0)
    held = _held(data)
    assert sum(len(train) + len(test) for train, test in held) == 100
    labels = np.concatenate([data.train(device).select(range(20))["labels"] for device in range(4)])
    assert len(set(labels.tolist())) == data.n_labels == 10


def test_images_need_no_tokenizer_but_texts_do():
    images = load_data(DataSpec(source="digits", image_size=16), None, 3, 0)
    batch = next(batches(images.train(0), 4))
    assert batch.inputs["pixel_values"].shape == (4, 3, 16, 16)
    with pytest.raises(FedsplitError, match="need a model with a tokenizer"):
        load_data(DataSpec(), None, 3, 0).train(0)


def test_too_many_devices_and_unknown_devices_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join("abcdefgh"))
    spec = DataSpec(source="text", path=str(tmp_path), seq_len=2)
    with pytest.raises(FedsplitError, match=r"fleet\.devices=5: must be at most 4"):
        load_data(spec, tokenizer, 5, 0)
    with pytest.raises(FedsplitError, match=r"device=2: must be in 0\.\.1"):
        load_data(spec, tokenizer, 2, 0).train(2)


def test_a_spec_survives_the_way_as_plain_values():
    spec = DataSpec(source="text", path="x.csv", prompt_column="q", target_column="a", alpha=1.0)
    assert from_mapping(DataSpec, to_mapping(spec), "data") == spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partition": "by hand"}, "data.partition='by hand': must be one of natural"),
        ({"loss_on": "prompt"}, "data.loss_on='prompt': must be one of target, all"),
        ({"seq_len": 1}, "data.seq_len=1: must be at least 2"),
        ({"alpha": 0.0}, "data.alpha=0.0"),
        ({"alpha": float("nan")}, "data.alpha=nan"),
        ({"test_fraction": 1.0}, "data.test_fraction=1.0"),
        ({"test_fraction": float("nan")}, "data.test_fraction=nan"),
        ({"min_samples": 1}, "data.min_samples=1"),
        ({"max_samples": 0}, "data.max_samples=0"),
        ({"shards_per_device": 0}, "data.shards_per_device=0"),
        ({"image_size": 0}, "data.image_size=0"),
        ({"prompt_column": "q"}, "data.prompt_column='q': must be given together"),
        ({"image_column": "img"}, "data.label_column=None: must be given"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(FedsplitError, match=message):
        DataSpec(**fields)
