"""What is swept over: Hydra's notation, a name and a folder for each member, files of studies."""

from pathlib import Path

import pytest
from fedsplit.apps.overrides import config_dir
from fedsplit.apps.sweep import members

from fedsplit.errors import FedsplitError


def swept(*texts: str) -> list[dict[str, object]]:
    return [member.values() for member in members(texts, multirun=True)]


def test_sweeps_multiply_out_and_groups_expand() -> None:
    found = members(["strategy=glob(*)", "channel.bandwidth_hz=5e6,10e6", "rounds=2"], True)
    names = {str(member.values()["strategy"]) for member in found}
    assert {"splitfed", "vanilla", "fedlora"} <= names
    assert len(found) == 2 * len(names)
    assert all(member.overrides[2] == "rounds=2" for member in found)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=0,1,2", [0, 1, 2]),
        ("seed=range(0,6,2)", [0, 2, 4]),
        ("seed=choice(3,1)", [3, 1]),
        ("seed=sort(3,1)", [1, 3]),
        ("channel.bandwidth_hz=interval(0,1),5e6", None),
        ("strategy=glob(f*)", ["fast", "fedlora", "fedsllm"]),
        ("strategy=glob(*,exclude=[f*,s*,v*])", ["card", "cpsl", "gsfl", "joint"]),
        ("channel.bandwidth_hz=5e6,1e7", [5e6, 1e7]),
        ("run.edge_nodes=true,false", [True, False]),
    ],
)
def test_the_notation_is_hydras(text: str, values: list[object] | None) -> None:
    if values is None:
        with pytest.raises(FedsplitError):
            swept(text)
        return
    key = text.partition("=")[0]
    assert [held[key] for held in swept(text)] == values


def test_the_last_changes_fastest() -> None:
    found = members(["seed=0,1", "strategy=sft,gsfl"], multirun=True)
    assert [member.name for member in found] == [
        "seed=0 strategy=sft",
        "seed=0 strategy=gsfl",
        "seed=1 strategy=sft",
        "seed=1 strategy=gsfl",
    ]


def test_a_folder_is_the_same_however_many_others_there_are() -> None:
    few, many = members(["seed=0,1"], True), members(["seed=1,2,0"], True)
    assert {member.folder for member in few} < {member.folder for member in many}
    assert few[0].folder == "seed=0"


@pytest.mark.parametrize(
    "text",
    [
        "seed=1234567,1234568",
        "train.optimizer.lr=0.12345678,0.12345679",
        "path=/a/b,/a_b",
        "path=../../x,/x",
        f"path={'x' * 200}a,{'x' * 200}b",
    ],
)
def test_members_never_share_a_name_or_a_folder(text: str) -> None:
    found = members([text], multirun=True)
    for names in ([member.name for member in found], [member.folder for member in found]):
        assert len(set(names)) == 2
        assert all("/" not in member.folder and len(member.folder) < 200 for member in found)


def test_without_multirun_a_sweep_is_refused() -> None:
    with pytest.raises(
        FedsplitError, match="rounds='1,2': must be one value; several .* --multirun"
    ):
        members(["rounds=1,2"], multirun=False)


def test_a_study_stands_for_its_overrides_and_what_is_typed_goes_first() -> None:
    whole = members(["study=schemes"], multirun=True)
    assert len(whole) == 11 * 2 * 5
    some = members(["study=schemes", "seed=7", "strategy=sft,gsfl"], multirun=True)
    assert len(some) == 2 * 2
    assert all("seed=7" in member.overrides for member in some)


def test_of_a_key_that_is_named_twice_the_last_counts() -> None:
    assert swept("seed=0,1,2", "rounds=1,2", "seed=5,6", "rounds=3") == [{"seed": 5}, {"seed": 6}]


def test_a_study_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("overrides: ['seed=0,1', 'strategy=sft']\n")
    assert len(members([f"study={file}"], multirun=True)) == 2
    for text in ("overrides: 3", "- a", "{", "overrides: [1]"):
        file.write_text(text)
        with pytest.raises(FedsplitError, match="study="):
            members([f"study={file}"], multirun=True)


def test_members_by_name_have_overrides_of_their_own(tmp_path: Path) -> None:
    """What is typed sweeps each of them, and does not change what is theirs."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "overrides: ['rounds=2']\nmembers:\n  one at a time: [strategy=vanilla]\n"
        "  by groups: [strategy=gsfl, 'strategy.groups=1,2']\n"
    )
    found = members([f"study={file}", "seed=0,1", "strategy=sft"], multirun=True)
    assert [member.name for member in found][:3] == [
        "one at a time seed=0",
        "one at a time seed=1",
        "by groups seed=0 groups=1",
    ]
    assert len({member.folder for member in found}) == len(found) == 2 + 4
    assert found[-1].values() == {"member": "by groups", "seed": 1, "strategy.groups": 2}
    assert "strategy=vanilla" in found[0].overrides
    for text in ("members: {a: 3}", "members: [a]", "members: {}"):
        file.write_text(text)
        with pytest.raises(FedsplitError, match="study="):
            members([f"study={file}"], multirun=True)


def test_every_shipped_study_opens_with_its_command() -> None:
    papers = {file.stem for file in (config_dir() / "paper").glob("*.yaml")}
    files = {file.stem: file for file in (config_dir() / "study").glob("*.yaml")}
    assert papers < files.keys()
    for name, file in files.items():
        command = f"reproduce {name}" if name in papers else f"run -m study={name}"
        assert file.read_text().startswith(f"# fedsplit {command}")
        assert members([f"study={name}"], multirun=True)
