"""What a server may name of a node's disk."""

import pytest

from fedsplit.data import DataSpec, confine
from fedsplit.errors import FedsplitError


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "allowed (1)"
    (root / "notes").mkdir(parents=True)
    (root / "notes" / "a.txt").write_text("a")
    (tmp_path / "secret.txt").write_text("s")
    (tmp_path / "allowed (1)2").mkdir()
    (root / "way_out").symlink_to(tmp_path)
    (root / "within").symlink_to(root / "notes")
    return root


def _text(path: object) -> DataSpec:
    return DataSpec(source="text", path=str(path))


def test_without_a_root_all_is_allowed():
    assert confine(_text("/etc/passwd"), None) == _text("/etc/passwd")


@pytest.mark.parametrize("path", ["notes", "notes/a.txt", "within/a.txt", "notes/../notes", "."])
def test_what_is_below_the_root_is_read_from_there(root, path):
    for named in (path, root / path):
        assert confine(_text(named), root) == _text((root / path).resolve())


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "..", "../secret.txt", "notes/../../secret.txt", "way_out/secret.txt",
     "way_out", "~/x", "{root}2", "{root}/../secret.txt"],
)  # fmt: skip
def test_what_is_outside_is_refused(root, path):
    spec = _text(path.replace("{root}", str(root)))
    with pytest.raises(FedsplitError, match=r"data\.path=.*: must be below this node's data-root"):
        confine(spec, root)


def test_a_local_folder_of_the_datasets_library_is_a_path_too(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    for name in ("/etc", "../x", "~/x", str(root.parent)):
        with pytest.raises(FedsplitError, match=r"data\.name=.*: must be below this node's"):
            confine(DataSpec(source="hub", name=name), root)
    for name in ("./x", "file:///etc", "hf://x", "allowed (1)2"):  # whatever is meant: below root
        spec = confine(DataSpec(source="hub", name=name), root)
        assert str(spec.name).startswith(f"{root}/")
    inside = DataSpec(source="hub", name=str(root / "notes"))
    assert confine(inside, root) == inside
    public = DataSpec(source="hub", name="Salesforce/wikitext")
    assert confine(public, root) == public


def test_other_sources_read_no_files_and_a_root_must_be_a_folder(root):
    assert confine(DataSpec(), root) == DataSpec()
    with pytest.raises(FedsplitError, match=r"data-root='.*nowhere': must be an existing folder"):
        confine(_text("a.txt"), root / "nowhere")
