"""What was found out about a model is kept on disk, and never believed for another version."""

import json
from pathlib import Path

import pytest

from fedsplit.models import ModelSpec, known, possible_cuts, routes
from fedsplit.models.known import FOLDER, cache_folder, recall, remember
from fedsplit.models.profile import profile_model
from fedsplit.models.tiny import tiny_config
from fedsplit.plan import Route


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """Return a four-block Llama that this process knows nothing of."""
    monkeypatch.setattr(routes, "_VERDICTS", {})
    monkeypatch.setattr(routes, "_TOGETHER", {})
    fields = tiny_config("llama", 4).to_diff_dict()
    return ModelSpec(
        model_type="llama", config={k: v for k, v in fields.items() if k != "model_type"}
    )


def test_an_entry_is_recalled_for_its_kind_and_key_alone(folder: Path) -> None:
    remember("cuts", "a", [1, 2])
    assert recall("cuts", "a") == [1, 2]
    assert recall("cuts", "b") is None
    assert recall("route", "a") is None
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_another_version_finds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember("cuts", "a", [1, 2])
    monkeypatch.setattr(known, "_environment", lambda: "torch 0")
    assert recall("cuts", "a") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"value": [3]}', "\ud83d", "[" * 100_000])
def test_a_corrupt_entry_is_nothing(folder: Path, text: str) -> None:
    remember("cuts", "a", [1, 2])
    (path,) = folder.iterdir()
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert recall("cuts", "a") is None
    remember("cuts", "a", [1, 2])
    assert recall("cuts", "a") == [1, 2]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({FOLDER: "/named", "XDG_CACHE_HOME": "/xdg"}, Path("/named")),
        ({FOLDER: "", "XDG_CACHE_HOME": "/xdg"}, None),
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, Path("/xdg/fedsplit")),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, Path("/home/me/.cache/fedsplit")),
        ({"HOME": "/home/me"}, Path("/home/me/.cache/fedsplit")),
    ],
)
def test_folder(
    variables: dict[str, str], expected: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (FOLDER, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected


def test_no_home_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(FOLDER)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
    remember("cuts", "a", [1])
    assert recall("cuts", "a") is None


def test_a_folder_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where the folder should be: refused to root as well, unlike a read-only folder."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    remember("cuts", "a", [1])
    assert recall("cuts", "a") is None


def test_cuts_routes_and_profiles_are_tried_once(
    folder: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts, profile = possible_cuts(spec), profile_model(spec, 8)
    routes.check_route(spec, Route.u_shaped(4, 1, 3))
    routes._VERDICTS.clear()
    routes._TOGETHER.clear()
    never = pytest.fail
    monkeypatch.setattr(routes, "find_difference", lambda *_: never("tried again"))
    monkeypatch.setattr("fedsplit.models.profile.planned_model", lambda _: never("built again"))
    assert possible_cuts(spec) == cuts == (0, 1, 2, 3)
    assert profile_model(spec, 8) == profile
    routes.check_route(spec, Route.u_shaped(4, 1, 3))


def test_what_is_kept_must_have_the_right_form(folder: Path, spec: ModelSpec) -> None:
    possible_cuts(spec)
    profile = profile_model(spec, 8)
    for path in folder.iterdir():
        entry = json.loads(path.read_text())
        path.write_text(json.dumps(entry | {"value": {"name": 7}}))
    routes._VERDICTS.clear()
    routes._TOGETHER.clear()
    assert possible_cuts(spec) == (0, 1, 2, 3)
    assert profile_model(spec, 8) == profile


@pytest.mark.parametrize("forgotten", [False, True], ids=["same process", "another process"])
def test_a_route_is_known_from_one_with_more_cuts(
    folder: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    """All cuts passed together; each of them, and two of them, need no trial of their own."""
    possible_cuts(spec)
    if forgotten:
        routes._VERDICTS.clear()
        routes._TOGETHER.clear()
    tried = []
    monkeypatch.setattr(routes, "find_difference", lambda *of: tried.append(str(of[-1])))
    routes.check_route(spec, Route.two_tier(4, 1))
    routes.check_route(spec, Route.three_tier(4, 0, 2))
    assert tried == []
    routes.check_route(spec, Route.u_shaped(4, 1, 2))
    assert len(tried) == 1
