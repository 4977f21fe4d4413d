"""Data that stay where they are: every device reads its own path, all of it."""

import json

import pytest

from fedsplit.data import Counts, DataSpec, DeviceCounts, describe, load_data, load_device
from fedsplit.errors import FedsplitError

LOCAL = DataSpec(source="text", partition="local", seq_len=8)


@pytest.fixture
def sites(tmp_path):
    """Files of four sites, of different kinds and sizes; every text is a letter of the site."""
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.csv", "d")]
    paths[0].write_text("\n\n".join(["a" * 9] * 20))
    paths[1].write_text("".join(json.dumps({"text": "b" * 9}) + "\n" for _ in range(7)))
    paths[2].write_text("text\n" + "ccccccccc\n" * 12)
    paths[3].mkdir()
    (paths[3] / "d1.txt").write_text("d" * 30 + "\n\n" + "d" * 30)
    (paths[3] / "d2.txt").write_text("d" * 30)
    return paths


def _texts(samples, tokenizer) -> str:
    return tokenizer.decode(samples.select(range(len(samples)))["input_ids"].flatten())


def _load(sites, tokenizer, device):
    return load_device(LOCAL, tokenizer, device=device, n_devices=4, seed=0, path=sites[device])


def test_a_device_reads_all_of_its_own_path_and_nothing_else(sites, tokenizer):
    for device, (letter, read) in enumerate(zip("abcd", (20, 7, 12, 3), strict=True)):
        data = _load(sites, tokenizer, device)
        assert data.counts.train.read + data.counts.test.read == read
        for samples in (data.train, data.test):
            assert set(_texts(samples, tokenizer).replace("<|end|>", "")) <= {letter, "\n"}


def test_the_server_learns_numbers_only(sites, tokenizer):
    told = {d: _load(sites, tokenizer, d).counts.flat() for d in range(4)}
    assert all(type(value) is int for flat in told.values() for value in flat.values())
    counts = {device: DeviceCounts.from_flat(flat) for device, flat in told.items()}
    assert counts == {device: _load(sites, tokenizer, device).counts for device in range(4)}
    assert describe(counts, 8)[0].startswith("data of 4 devices: 42 examples read; ")


@pytest.mark.parametrize("value", [None, -1, 1.5, "3", True, float("nan")])
def test_numbers_that_a_device_cannot_mean_are_refused(value):
    flat = DeviceCounts(train=Counts(read=3, samples=2), test=Counts(read=1, samples=1)).flat()
    with pytest.raises(FedsplitError, match=r"test-cut=.*: must be a whole number, at least 0"):
        DeviceCounts.from_flat({**flat, "test-cut": value})
    del flat["train-read"]
    with pytest.raises(FedsplitError, match="train-read=None"):
        DeviceCounts.from_flat(flat)


def test_a_shared_data_set_is_read_device_by_device_the_same(tokenizer, sites):
    spec = DataSpec(source="text", path=str(sites[0]), seq_len=8)
    whole = load_data(spec, tokenizer, 2, seed=3)
    for device in range(2):
        one = load_device(spec, tokenizer, device=device, n_devices=2, seed=3)
        for mine, same in ((one.train, whole.train(device)), (one.test, whole.test(device))):
            assert _texts(mine, tokenizer) == _texts(same, tokenizer)
        assert one.counts == whole.counts()[device]


def test_sites_with_a_test_set_test_on_all_of_it(tmp_path, tokenizer):
    (tmp_path / "devset.csv").write_text("mr,ref\n" + "name[A],It is A.\n" * 6)
    (tmp_path / "testset_w_refs.csv").write_text("mr,ref\n" + "name[B],It is B.\n" * 5)
    spec = DataSpec(source="e2e", partition="local", seq_len=40)
    data = load_device(spec, tokenizer, device=1, n_devices=2, seed=0, path=tmp_path)
    assert (len(data.train), len(data.test)) == (6, 5)


def test_what_does_not_fit_together_is_refused(sites, tokenizer, tmp_path):
    def load(spec=LOCAL, **more):
        arguments = {"device": 2, "n_devices": 4, "seed": 0, "path": sites[2], **more}
        return load_device(spec, tokenizer, **arguments)

    with pytest.raises(FedsplitError, match=r"data-path=None: must be given for device 2"):
        load(path=None)
    with pytest.raises(FedsplitError, match=r"data\.path='/nowhere': must be an existing file"):
        load(path="/nowhere")
    with pytest.raises(FedsplitError, match=r"device=4: must be in 0\.\.3"):
        load(device=4)
    with pytest.raises(
        FedsplitError, match=r"data-path=.*: must be null: only with data\.partition"
    ):
        load(DataSpec())
    with pytest.raises(
        FedsplitError, match=r"data\.partition='local': must be .* another|read device"
    ):
        load_data(LOCAL, tokenizer, 4, seed=0)
    (tmp_path / "one.txt").write_text("only one paragraph")
    with pytest.raises(FedsplitError, match=r"one\.txt: holds 1 examples for device 2, must be at"):
        load(path=tmp_path / "one.txt")
