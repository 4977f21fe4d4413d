"""Cuts that an audit allows: those where its best attack reads little enough."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from fedsplit.errors import SettingsError, require
from fedsplit.flower.system import System
from fedsplit.mapping import from_mapping
from fedsplit.plan import Route

from .audit_report import codec_name, defence_name
from .config import model_spec
from .spending import BOUND, privacy_spec
from .values import plain


@dataclass(frozen=True, kw_only=True)
class AuditBound:
    """What an audit may say of a cut that is planned.

    Parameters
    ----------
    audit : str or None
        File of the audit; None: cuts are not bounded.
    max_read : float or None
        Share of private tokens that its best attack may read.

    Raises
    ------
    SettingsError
        If only one is given, or the share is none.
    """

    audit: str | None = None
    max_read: float | None = None

    def __post_init__(self) -> None:
        audit, most = self.audit, self.max_read
        require(
            audit is not None or most is None,
            "privacy.audit",
            audit,
            "given with privacy.max_read",
        )
        require(
            most is not None or audit is None,
            "privacy.max_read",
            most,
            "given with privacy.audit",
        )
        require(most is None or 0 <= most <= 1, "privacy.max_read", most, "from 0 to 1")


def within_audit(system: System, config: DictConfig) -> System:
    """Return `system` with the cuts alone of which ``privacy.audit`` says that they may be.

    Each scheme that chooses cuts chooses among them, and a plan with another is refused.

    Raises
    ------
    SettingsError
        If the file is no audit, says nothing of this model, codec and defence, or allows no cut.
    """
    own = {name: value for name, value in plain(config.privacy).items() if name in BOUND}
    bound = from_mapping(AuditBound, own, "privacy")
    path, most = bound.audit, bound.max_read
    if path is None or most is None:
        return system
    codec, narrow = codec_name(system.codec.uplink), model_spec(config).bottleneck
    about = (system.profile.name, codec, defence_name(privacy_spec(config), narrow))
    read = _read(Path(path), about)
    possible = tuple(cut for cut in system.possible_cuts() if cut in read and read[cut] <= most)
    least = min(read.values())
    require(
        bool(possible), "privacy.max_read", most, f"at least {least:.3f}, as privacy.audit says"
    )

    def try_route(route: Route) -> None:
        system.try_route(route)
        cut = route.segments[0].stop
        if len(route.segments) > 1 and cut not in possible:
            allowed = f"at least {read[cut]:.3f}" if cut in read else "of an audit that tried it"
            raise SettingsError("privacy.max_read", most, f"{allowed}, for cut {cut}")

    def codec_ratio(settings: Mapping[str, object]) -> float:
        if settings not in (system.codec.uplink, system.codec.downlink):
            own = "a scheme that plans codecs of its own (strategy.codec_table=null: the run's)"
            raise SettingsError("privacy.max_read", most, f"null with {own}")
        return system.codec_ratio(settings)

    def possible_cuts() -> Sequence[int]:
        return possible

    return replace(
        system, possible_cuts=possible_cuts, try_route=try_route, codec_ratio=codec_ratio
    )


def _read(path: Path, about: tuple[str, str, str]) -> dict[int, float]:
    """Return what the best attack read at each cut."""
    try:
        audits = json.loads(path.read_text(encoding="utf-8"))["audits"]
        found = [
            ((item["model"], item["codec"], item["defence"]), int(item["cut"]), float(item["best"]))
            for item in audits
            if item["best"] is not None
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        allowed = "an audit.json of `fedsplit audit`"
        raise SettingsError("privacy.audit", str(path), allowed) from error
    read: dict[int, float] = {}
    for told, cut, share in found:
        if told == about:
            read[cut] = max(share, read.get(cut, 0.0))
    model, codec, defence = about
    allowed = f"of model {model!r} with codec {codec} and defence {defence}"
    require(bool(read), "privacy.audit", str(path), allowed)
    return read
