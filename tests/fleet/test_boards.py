"""A fleet from a CSV of boards: each is what its line says, and a wrong line is named."""

from pathlib import Path

import pytest
from fedsplit.apps.config import fleet_spec, load_config

from fedsplit.errors import FedsplitError
from fedsplit.fleet import build_fleet
from fedsplit.fleet.boards import read_boards

HEAD = "name,flops_per_s,memory_bytes,power_w,max_hz,min_hz,count\n"
GOOD = HEAD + "pi,1e10,4e9,6,1.5e9,6e8,2\nbox,2e12,1.6e10,40,,,\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "boards.csv"
    path.write_text(GOOD)
    return path


def test_boards_are_dealt_out_as_often_as_they_count(file: Path) -> None:
    config = load_config(["fleet=boards", f"fleet.csv={file}", "fleet.devices=5"])
    devices = build_fleet(fleet_spec(config)).devices
    assert devices.names == ("pi", "pi", "box", "pi", "pi")
    utilisation = config.fleet.utilisation
    assert devices.flops == pytest.approx(
        [utilisation * peak for peak in (1e10, 1e10, 2e12, 1e10, 1e10)]
    )
    assert devices.memory_bytes[1:3].tolist() == [4e9, 1.6e10]
    assert devices.min_hz[1:3].tolist() == [6e8, 1e9]


def test_energy_is_power_at_the_highest_clock(file: Path) -> None:
    boards, _ = read_boards(file)
    pi = boards["pi"]
    assert pi.energy_coefficient * pi.max_hz**3 == pytest.approx(6)


def test_boards_may_be_named_as_types_and_servers(file: Path) -> None:
    spec = fleet_spec(load_config([f"fleet.csv={file}", "fleet.types=[pi]", "fleet.server=box"]))
    assert set(build_fleet(spec).devices.names) == {"pi"}
    assert build_fleet(spec).servers.names == ("box",)


def test_boards_that_nothing_uses_are_not_passed_over(file: Path) -> None:
    with pytest.raises(FedsplitError, match=r"fleet.csv=.*boards.csv'?: must be used"):
        fleet_spec(load_config([f"fleet.csv={file}"]))
    with pytest.raises(FedsplitError, match="fleet.csv=None: must be a CSV of boards"):
        fleet_spec(load_config(["fleet=boards"]))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name,power_w\n", "line 1='name,power_w': must be the columns name, flops_per_s"),
        (HEAD, "must be at least one"),
        (HEAD + "a,fast,1,1,,,\n", "line 2: flops_per_s='fast': must be a number"),
        (HEAD + "a,0,1,1,,,\n", "line 2: flops_per_s=0.0: must be finite and above 0"),
        (HEAD + "a,1,1,1,1,2,\n", "line 2: min_hz=2.0: must be at most max_hz=1"),
        (HEAD + "a,1,1,1,0,,\n", "line 2: max_hz=0.0: must be above 0"),
        (HEAD + "a,1,1,1,,,1.5\n", "line 2: count='1.5': must be a whole number"),
        (HEAD + "a,1,1,1,,,\na,1,1,1,,,\n", "line 3: name='a': must be a new name"),
        (HEAD + "a,1,1\n", "line 2: power_w=None: must be a number"),
    ],
)
def test_mistakes_are_named(file: Path, text: str, named: str) -> None:
    file.write_text(text)
    with pytest.raises(FedsplitError, match=named):
        read_boards(file)
