"""Samples and batches: what the model is given, token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.data import DataSpec, batches, training_batches
from fedsplit.data.counts import Counts
from fedsplit.data.examples import Pair, Picture, Text, paragraphs
from fedsplit.data.samples import IGNORED, PictureSamples, TokenSamples
from fedsplit.data.tokens import pack, pad
from fedsplit.errors import FedsplitError
from fedsplit.seeds import generator


def _numbered(n_samples: int) -> TokenSamples:
    """Samples whose only token is their own number."""
    return TokenSamples({"input_ids": torch.arange(n_samples)[:, None]})


@settings(max_examples=50, deadline=None)
@given(n_samples=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_an_epoch_visits_every_sample_once(n_samples, batch_size, seed):
    epoch = list(batches(_numbered(n_samples), batch_size, generator(seed)))
    visited = [sample for batch in epoch for sample in batch.samples]
    assert sorted(visited) == list(range(n_samples))
    for batch in epoch:
        assert batch.inputs["input_ids"].flatten().tolist() == list(batch.samples)


def test_without_a_generator_batches_come_in_order():
    assert [batch.samples for batch in batches(_numbered(5), 2)] == [(0, 1), (2, 3), (4,)]
    assert [batch.samples for batch in batches(_numbered(5), 2, drop_last=True)] == [(0, 1), (2, 3)]


@settings(max_examples=50, deadline=None)
@given(
    n_samples=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    steps=st.integers(0, 40),
    seed=st.integers(0, 2**40),
)
def test_training_batches_are_as_many_as_asked_for_and_of_one_size(
    n_samples, batch_size, steps, seed
):
    drawn = list(training_batches(_numbered(n_samples), batch_size, generator(seed), steps))
    assert len(drawn) == steps
    size = min(batch_size, n_samples)
    assert all(len(set(batch.samples)) == len(batch.samples) == size for batch in drawn)
    per_epoch = n_samples // size
    for start in range(0, steps - per_epoch + 1, per_epoch):
        epoch = [s for batch in drawn[start : start + per_epoch] for s in batch.samples]
        assert len(set(epoch)) == len(epoch) == per_epoch * size


@settings(max_examples=50, deadline=None)
@given(
    n_samples=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    skipped=st.integers(0, 40),
    seed=st.integers(0, 2**40),
)
def test_training_goes_on_where_it_was(n_samples, batch_size, skipped, seed):
    def of(steps, skipped=0):
        samples = _numbered(n_samples)
        found = training_batches(samples, batch_size, generator(seed), steps, skipped)
        return [batch.samples for batch in found]

    assert of(5, skipped) == of(skipped + 5)[skipped:]


def test_training_goes_through_the_samples_in_another_order_every_epoch():
    drawn = list(training_batches(_numbered(32), 32, generator(0), 3))
    assert len({batch.samples for batch in drawn}) == 3


def test_texts_are_packed_without_padding_and_unrelated_ones_are_separated(tokenizer):
    texts = [Text("abc\n\n", 0, ends=False), Text("de", 0), Text("", 0), Text("fghij", 0)]
    samples = pack(texts, tokenizer, 4)
    assert tokenizer.batch_decode(samples.tensors["input_ids"]) == [
        "abc\n",
        "\nde<|end|>",
        "fghi",
    ]
    assert set(samples.tensors) == {"input_ids", "labels"}
    torch.testing.assert_close(samples.tensors["labels"], samples.tensors["input_ids"])


def test_the_loss_of_a_pair_is_on_its_target_and_end_only(tokenizer):
    samples = pad([Pair("ab", "xyz", 0)], tokenizer, DataSpec(seq_len=9))
    ids, labels, mask = (samples.tensors[n][0] for n in ("input_ids", "labels", "attention_mask"))
    learnt = labels != IGNORED
    assert tokenizer.decode(ids[mask.bool()]) == "ab\nxyz<|end|>"
    assert tokenizer.decode(ids[learnt]) == "xyz<|end|>"
    torch.testing.assert_close(labels[learnt], ids[learnt])
    assert mask.tolist() == [1] * 7 + [0] * 2


def test_the_prompt_is_learnt_too_if_asked_for_but_padding_never(tokenizer):
    spec = DataSpec(seq_len=9, loss_on="all")
    labels = pad([Pair("ab", "xyz", 0)], tokenizer, spec).tensors["labels"][0]
    assert (labels != IGNORED).tolist() == [True] * 7 + [False] * 2


def test_long_pairs_are_cut_and_pairs_without_room_for_a_target_left_out(tokenizer):
    pairs = [Pair("a", "x" * 20, 0), Pair("b" * 20, "y", 0), Pair("c", "z", 0)]
    samples = pad(pairs, tokenizer, DataSpec(seq_len=6))
    assert tokenizer.batch_decode(samples.tensors["input_ids"][:1]) == ["a\nxxxx"]
    assert samples.counts == Counts(read=3, samples=2, cut=1, dropped=1, tokens=6 + 4, longest=6)
    with pytest.raises(FedsplitError, match=r"data\.seq_len=6: must be above 21, .* device 3 has"):
        pad(
            [Pair("b" * 20, "y", 0)],
            tokenizer,
            DataSpec(seq_len=6),
            whose="device 3 has to test on",
        )


def test_a_pair_that_fits_exactly_is_not_cut_and_one_target_token_is_enough_to_keep_it(tokenizer):
    exact = pad([Pair("ab", "xyz", 0)], tokenizer, DataSpec(seq_len=7)).counts
    assert (exact.samples, exact.cut, exact.dropped, exact.longest) == (1, 0, 0, 7)
    one = pad([Pair("ab", "xyz", 0)], tokenizer, DataSpec(seq_len=4)).counts
    assert (one.samples, one.cut, one.dropped, one.longest) == (1, 1, 0, 4)
    with pytest.raises(FedsplitError, match=r"data\.seq_len=3: must be above 3"):
        pad([Pair("ab", "xyz", 0)], tokenizer, DataSpec(seq_len=3))


def test_each_document_begins_as_the_tokenizer_begins_a_text(tokenizer, beginning_tokenizer):
    texts = [Text("ab\n\n", 0, ends=False), Text("c", 0), Text("", 0), Text("de", 0)]
    (ids,) = pack(texts, beginning_tokenizer, 11).tensors["input_ids"]
    assert beginning_tokenizer.decode(ids) == "<|begin|>ab\n\nc<|end|><|begin|>de<|end|>"
    # What a model was pretrained on: one document, tokenized with its special tokens, and the end.
    first = [*beginning_tokenizer("ab\n\nc").input_ids, beginning_tokenizer.eos_token_id]
    assert ids[: len(first)].tolist() == first
    assert "<|begin|>" not in tokenizer.decode(pack(texts, tokenizer, 9).tensors["input_ids"][0])


def test_packing_counts_what_it_read_and_what_was_empty(tokenizer):
    counts = pack([Text("abc", 0), Text("", 0), Text("defg", 0)], tokenizer, 4).counts
    assert counts == Counts(read=3, samples=2, dropped=1, tokens=8, longest=4, left_over=1)


def test_batches_may_be_as_long_as_their_longest_sample_in_steps_of_eight(tokenizer):
    pairs = [Pair("a", "b" * n, 0) for n in (1, 7, 20)]  # 4, 10 and 23 tokens with "\n" and the end
    fixed = pad(pairs, tokenizer, DataSpec(seq_len=30))
    short = pad(pairs, tokenizer, DataSpec(seq_len=30, padding="longest"))
    for indices, length in (([0], 8), ([0, 1], 16), ([2], 24), ([1, 0, 2], 24)):
        full, cut = fixed.select(indices), short.select(indices)
        assert {tensor.shape for tensor in cut.values()} == {(len(indices), length)}
        for name, tensor in cut.items():
            torch.testing.assert_close(tensor, full[name][:, :length], rtol=0, atol=0)
        assert not full["attention_mask"][:, length:].any()
    to_the_limit = pad(pairs, tokenizer, DataSpec(seq_len=22, padding="longest"))
    assert to_the_limit.select([2])["input_ids"].shape == (1, 22)


def test_too_little_text_for_one_sample_makes_a_padded_one(tokenizer):
    samples = pack([Text("abc", 0)], tokenizer, 10)
    ids, labels, mask = (samples.tensors[n][0] for n in ("input_ids", "labels", "attention_mask"))
    assert tokenizer.decode(ids[mask.bool()]) == "abc<|end|>"
    assert (labels != IGNORED).tolist() == [True] * 4 + [False] * 6
    assert samples.counts == Counts(read=1, samples=1, tokens=4, longest=4)
    with pytest.raises(FedsplitError, match=r"'a\.txt': must be text of 2 tokens .* device 1 has"):
        pack([Text("", 0, file="a.txt")], tokenizer, 10, whose="device 1 has to test on")


def test_pictures_are_resized_and_scaled():
    black_and_white = np.stack([np.zeros((2, 2)), np.full((2, 2), 255)]).astype(np.uint8)
    pictures = [
        Picture(np.repeat(image[None], 3, axis=0), i) for i, image in enumerate(black_and_white)
    ]
    inputs = PictureSamples(pictures, image_size=5).select((1, 0))
    assert inputs["labels"].tolist() == [1, 0]
    expected = torch.ones(2, 3, 5, 5)
    expected[1] = -1
    torch.testing.assert_close(inputs["pixel_values"], expected)


def test_paragraphs_keep_the_text_and_mark_where_the_document_ends():
    document = "one\ntwo\n\n \t\n\n    three\n \nfour\n"
    parts = paragraphs(document, 7)
    assert [part.text for part in parts] == ["one\ntwo\n\n", "    three\n\n", "four\n\n"]
    assert [part.ends for part in parts] == [False, False, True]


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(FedsplitError, match="batch_size=0"):
        next(batches(_numbered(3), 0))
