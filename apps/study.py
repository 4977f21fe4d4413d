"""``fedsplit run -m``: one run for every combination of what is swept over, one after the other."""

import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedsplit.errors import FedsplitError, SettingsError, require
from fedsplit.report import plain_text, read_records
from fedsplit.report.lock import locked
from fedsplit.report.studies.members import (
    DONE,
    FAILED,
    REFUSED,
    MemberRecord,
    read_members,
    write_members,
)

from .config import load_config, output_folder, require_plain
from .launch.engine import FLOWER, Engine
from .launch.run import LOG, train
from .outputs import make_folder
from .overrides import quoted
from .resume import RESULTS, is_done
from .server_app import ERROR_FILE
from .sweep import Member, members

_USAGE = 2


def run_study(overrides: Sequence[str], console: Console) -> int:
    """Run every member of a study and leave one table of them all.

    Runs that are complete in the study's folder are not run again; one that was cut short goes
    on. One that is refused or fails does not end the others.

    Parameters
    ----------
    overrides : sequence of str
        Hydra overrides, with sweeps.
    console : Console
        Where the runs and the table of the members are shown.

    Returns
    -------
    int
        Exit code: 0; 1 if any member was refused or failed, 2 if all were refused.

    Raises
    ------
    FedsplitError
        If the overrides cannot be parsed, all are refused for the same reason, or the folder holds
        other runs than these.
    """
    _, records = run_members(members(overrides, multirun=True), console)
    statuses = [record.status for record in records]
    if all(status == REFUSED for status in statuses):
        return _USAGE
    return int(any(status != DONE for status in statuses))


def run_members(found: Sequence[Member], console: Console) -> tuple[Path, list[MemberRecord]]:
    """Do what `run_study` does for `found`; return the study's folder and a record of each member.

    Raises
    ------
    FedsplitError
        As `run_study`.
    """
    folder, refused = _prepared(found)
    reasons = set(refused.values())
    if len(refused) == len(found) and len(reasons) == 1:
        raise FedsplitError(reasons.pop())
    make_folder(folder)
    with locked(folder):
        records = _run_all(found, folder, refused, console)
    console.print(_summary(records, folder))
    if any((folder / record.folder / RESULTS).exists() for record in records):
        from fedsplit.report.studies.frame import Study

        written = " and ".join(path.name for path in Study.open(folder).write())
        console.print(f"[bold]{plain_text(folder)}[/bold]: {written}", soft_wrap=True)
    return folder, records


def _prepared(found: Sequence[Member]) -> tuple[Path, dict[str, str]]:
    """Return the study's folder, and why members are refused that are wrong by themselves."""
    refused: dict[str, str] = {}
    folders: set[Path] = set()
    default = time.strftime("outputs/study_%Y-%m-%d_%H-%M-%S")
    for member in found:
        try:
            config = load_config(member.overrides)
            require_plain(config)
        except FedsplitError as error:
            refused[member.folder] = str(error)
        else:
            require(config.resume is None, "resume", config.resume, "absent with -m: name output=")
            folders.add(output_folder(config, default))
    if len(folders) > 1:
        listed = ", ".join(map(str, sorted(folders)))
        raise SettingsError("output", listed, "one folder for all members of a study")
    folder = folders.pop() if folders else output_folder(load_config([]), default)
    if (folder / RESULTS).exists():
        raise FedsplitError(f"output={str(folder)!r}: holds a single run; name another folder")
    return folder, refused


def _run_all(
    found: Sequence[Member], folder: Path, refused: Mapping[str, str], console: Console
) -> list[MemberRecord]:
    """Run what is missing; return a record of each member, and keep them in the folder."""
    earlier = {record.folder: record for record in read_members(folder)}
    for member in found:  # a folder of other runs is refused before any of these starts
        if member.folder not in refused:
            _is_complete(member, folder)
    ours: dict[str, MemberRecord] = {}
    with Engine() as engine:
        for number, member in enumerate(found, 1):
            console.rule(plain_text(f"{number}/{len(found)}  {member.name}"), align="left")
            begun = time.monotonic()
            reason, status = refused.get(member.folder), REFUSED
            wall_s = 0.0
            if reason is None:
                if _is_complete(member, folder):
                    console.print("is complete")
                    wall_s = earlier[member.folder].wall_s if member.folder in earlier else 0.0
                    status = DONE
                else:
                    status, reason = _run_one(member, folder, engine, console)
                    wall_s = time.monotonic() - begun
            if reason is not None:
                console.print(f"[red]{status}[/red]: {plain_text(reason)}", soft_wrap=True)
            ours[member.folder] = MemberRecord(
                name=member.name,
                folder=member.folder,
                swept=_values(member),
                status=status,
                reason=reason,
                wall_s=wall_s,
            )
            write_members(folder, list({**earlier, **ours}.values()))
    return list(ours.values())


def _values(member: Member) -> Mapping[str, Any]:
    try:
        return member.values()
    except FedsplitError:  # it is refused for that
        return member.swept


def _overrides(member: Member, folder: Path) -> list[str]:
    return [*member.overrides, f"output={quoted(str(folder / member.folder))}"]


def _is_complete(member: Member, folder: Path) -> bool:
    overrides = _overrides(member, folder)
    return is_done(overrides, load_config(overrides), folder / member.folder)


def _run_one(
    member: Member, folder: Path, engine: Engine, console: Console
) -> tuple[str, str | None]:
    """Run a member; return its status, and why it is not done."""
    overrides = _overrides(member, folder)
    try:
        if load_config(overrides).run.engine == FLOWER:  # Ray's processes end with their root
            with Engine() as own:
                cause = train(overrides, own, console)[1]
        else:
            cause = train(overrides, engine, console)[1]
    except FedsplitError as error:
        return REFUSED, " ".join(str(error).split())
    except Exception as error:
        # A night's study must not end for one member; what went wrong is kept beside it.
        place = make_folder(folder / member.folder) / ERROR_FILE
        place.write_text(traceback.format_exc(), encoding="utf-8")
        return FAILED, f"{type(error).__name__}: {' '.join(str(error).split())} (see {place})"
    if cause is None:
        return DONE, None
    return FAILED, f"{' '.join(cause.split())} (see {folder / member.folder / LOG})"


def _summary(records: Sequence[MemberRecord], folder: Path) -> Table:
    """Return a row for each member: how it ended, and its last round."""
    table = Table(
        title=f"Study in {plain_text(folder)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("run", overflow="fold")
    for heading in ("status", "rounds", "eval loss", "modelled s", "modelled J", "wall s"):
        table.add_column(heading, justify="right")
    for record in records:
        if record.reason is not None:
            why = plain_text(f"{record.name}: {record.reason}")
            table.add_row(why, record.status, *["-"] * 5)
            continue
        rounds = read_records(folder / record.folder)
        modelled = [item.modelled for item in rounds if item.modelled is not None]
        losses = [item.eval_loss for item in rounds if item.eval_loss is not None]
        table.add_row(
            plain_text(record.name),
            record.status,
            str(rounds[-1].round if rounds else 0),
            f"{losses[-1]:.4f}" if losses else "-",
            f"{sum(item['delay_s'] for item in modelled):.4g}",
            f"{sum(item['energy_j'] for item in modelled):.4g}",
            f"{record.wall_s:.1f}",
        )
    return table
