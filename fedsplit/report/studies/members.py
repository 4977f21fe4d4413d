"""Which runs belong to a study, and how each ended: ``study.json`` in its folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsplit.errors import FedsplitError, require, require_choice
from fedsplit.mapping import from_mapping
from fedsplit.report.files import json_text, write_atomically

STUDY = "study.json"
DONE, REFUSED, FAILED = STATUSES = "done", "refused", "failed"


@dataclass(frozen=True, kw_only=True)
class MemberRecord:
    """One run of a study.

    Parameters
    ----------
    name : str
        What is swept over and its values, to read.
    folder : str
        Name of its folder in the study's.
    swept : mapping
        What is swept over, by its whole key: number, text or truth.
    status : str
        ``done``; ``refused`` before it started; ``failed`` in its course.
    reason : str or None
        Why it is not done, in one line.
    wall_s : float
        Seconds that it took.
    """

    name: str
    folder: str
    swept: Mapping[str, Any]
    status: str
    reason: str | None = None
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        require_choice("status", self.status, STATUSES)
        require(Path(self.folder).name == self.folder, "folder", self.folder, "a folder's name")


def write_members(folder: Path, members: Sequence[MemberRecord]) -> None:
    """Keep `members` in the folder of their study."""
    values = {"members": [asdict(member) for member in members]}
    write_atomically(folder / STUDY, json_text(values))


def read_members(folder: Path) -> list[MemberRecord]:
    """Return the members of the study in `folder`; none where no study was begun.

    Raises
    ------
    FedsplitError
        If the file is not one that `write_members` wrote.
    """
    path = folder / STUDY
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["members"]
        return [from_mapping(MemberRecord, values, "member") for values in listed]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise FedsplitError(f"{path}: is not the record of a study ({error})") from error
