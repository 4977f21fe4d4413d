"""Partitioners of flwr-datasets by name: what they give is what that library gives."""

import json
import sys

import numpy as np
import pytest

from fedsplit.data import DataSpec, load_data
from fedsplit.data.partition import divide
from fedsplit.errors import FedsplitError
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.seeds import generator

GROUPS = np.repeat(np.arange(5), 40)


def _target(name: str, **settings: object) -> dict[str, object]:
    return {"_target_": f"flwr_datasets.partitioner.{name}", **settings}


def _divide(n_devices: int, partition, **more):
    return divide(GROUPS, n_devices, partition, generator(0), **more)


def test_without_the_library_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(FedsplitError, match=r"pip install 'fedsplit\[partitioners\]'"):
        _divide(4, _target("IidPartitioner"))


def test_a_spec_with_a_partitioner_travels_as_plain_values():
    spec = DataSpec(partition=_target("DirichletPartitioner", alpha=0.3, self_balancing=True))
    values = json.loads(json.dumps(to_mapping(spec)))
    assert from_mapping(DataSpec, values, "data") == spec


@pytest.fixture
def flwr_partitioner():
    return pytest.importorskip(
        "flwr_datasets.partitioner", reason="flwr-datasets (fedsplit[partitioners])"
    )


@pytest.mark.parametrize(
    "settings",
    [
        _target("IidPartitioner"),
        _target("LinearPartitioner"),
        _target("DirichletPartitioner", alpha=0.5, min_partition_size=2),
        _target("DirichletPartitioner", alpha=0.5, partition_by="theme"),
        _target(
            "PathologicalPartitioner",
            num_classes_per_partition=2,
            class_assignment_mode="deterministic",
        ),
        _target("ShardPartitioner", num_shards_per_partition=2),
        _target("NaturalIdPartitioner"),
    ],
    ids=lambda settings: str(settings["_target_"]).rpartition(".")[2],
)
def test_each_example_is_held_once_as_the_library_divides(flwr_partitioner, settings):
    shares = _divide(5, settings, label="theme")
    assert sorted(np.concatenate(shares)) == list(range(len(GROUPS)))
    assert all((np.diff(share) > 0).all() for share in shares)
    again = _divide(5, settings, label="theme")
    assert all((one == other).all() for one, other in zip(shares, again, strict=True))


def test_settings_reach_the_partitioner(flwr_partitioner):
    from datasets import Dataset

    own = flwr_partitioner.DirichletPartitioner(
        num_partitions=4, partition_by="label", alpha=0.2, min_partition_size=3, seed=7
    )
    own.dataset = Dataset.from_dict({"label": GROUPS, "place": np.arange(len(GROUPS))})
    settings = _target("DirichletPartitioner", alpha=0.2, min_partition_size=3, seed=7)
    for device, share in enumerate(_divide(4, settings)):
        assert share.tolist() == sorted(own.load_partition(device)["place"])


def test_natural_ids_are_whole_groups(flwr_partitioner):
    for share in _divide(5, _target("NaturalIdPartitioner")):
        assert len(set(GROUPS[share])) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (_target("NoPartitioner"), ", DirichletPartitioner, "),
        (_target("Partitioner"), ", DirichletPartitioner, "),
        (_target("partitioner.Partitioner"), ", DirichletPartitioner, "),
        (
            _target("IidPartitioner", alpha=1),
            "data.partition='alpha': must be one of num_partitions",
        ),
        (_target("DirichletPartitioner", alpha=-1), "DirichletPartitioner': "),
        (_target("DirichletPartitioner"), "DirichletPartitioner': "),
        (_target("NaturalIdPartitioner"), "fleet.devices=4: must be 5, the parts of"),
    ],
)
def test_what_the_library_refuses_is_refused(flwr_partitioner, settings, says):
    with pytest.raises(FedsplitError) as caught:
        _divide(4, settings)
    assert says in str(caught.value)


def test_a_job_divides_its_data_so(flwr_partitioner, tokenizer):
    partition = _target("DirichletPartitioner", alpha=0.3)
    data = load_data(DataSpec(partition=partition, seq_len=64), tokenizer, 4, seed=0)
    assert len(set(data.sizes)) > 1
    assert all(item.train.samples > 0 for item in data.counts().values())
