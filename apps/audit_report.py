"""What an audit found: a table, a plot, JSON, CSV, and a sentence for each configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsplit.figures import PAGE_IN, figure, legend, styles
from fedsplit.models import Bottleneck
from fedsplit.plan import Turn
from fedsplit.privacy import PrivacySpec
from fedsplit.report import plain_text
from fedsplit.report.files import csv_text, json_text, write_atomically

_DOMAINS = {"same": "the same domain", "other": "another domain", "none": "none"}


def codec_name(settings: Mapping[str, object]) -> str:
    """Return a codec and its options in a word."""
    options = ",".join(f"{key}={value}" for key, value in settings.items() if key != "name")
    return str(settings["name"]) + (f"({options})" if options else "")


def defence_name(privacy: PrivacySpec, bottleneck: Bottleneck | None) -> str:
    """Return what a device does to what it sends, in a few words."""
    parts = []
    if bottleneck is not None:
        parts.append(f"{bottleneck.width} wide after {bottleneck.after}")
    for name in ("correlation", "reader"):
        if weight := getattr(privacy, f"{name}_weight"):
            parts.append(f"{name} {weight:g}")
    if privacy.clip is not None:
        noise = privacy.noise_multiplier
        parts.append(f"clip {privacy.clip:g}, noise {noise:g} per {privacy.unit}")
    return ", ".join(parts) or "none"


@dataclass(frozen=True)
class Attack:
    """An attack's success on private texts.

    Parameters
    ----------
    attack : str
        "nearest" (embedding), "ridge" (a linear map) or "inverter" (a small network).
    domain : str
        Of the server's own texts: "same", "other" or "none".
    texts : int
        How many it has.
    tokens : float
        Share of private tokens that it reads exactly from what crosses the first cut.
    rouge_l : float
        ROUGE-L (F1) of what it reads, mean over texts.
    joined : float
        The share where it also takes the tokens that labels tell, if that helps.
    """

    attack: str
    domain: str
    texts: int
    tokens: float
    rouge_l: float
    joined: float


@dataclass(frozen=True)
class Update:
    """What is read of the adapters that a device hands back after a turn.

    Parameters
    ----------
    steps : int
        Mini-batches of the turn.
    distinct : int
        Different tokens in them.
    tokens : float
        Share of these that are among as many that the aggregator names.
    guessing : float
        The same, naming those that its own texts have most often.
    why_not : str
        Why no turn could be tried, such as a loss that is not finite.
    """

    steps: int
    distinct: int = 0
    tokens: float = 0.0
    guessing: float = 0.0
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What one kind of turn gives away.

    Parameters
    ----------
    name : str
        The configuration, or what it differs in from others.
    model : str
        The model.
    route, codec, defence : str
        Where the model is cut, how boundaries travel, and what is done to them first.
    cut : int
        Blocks on the device before the first server.
    labels : float
        Share of labels that the server learns: all on an open route, else those that it finds in
        gradients.
    told : float
        Share of private tokens that these labels tell it.
    guessing : float
        Share of private tokens that are the most frequent one.
    norm : float
        Median L2 norm of the units that are clipped, as they are sent.
    attacks : tuple of Attack
        On what crosses the first cut.
    update : Update or None
        On the adapters that come back; None where the first block trains none.
    """

    name: str
    model: str
    route: str
    cut: int
    codec: str
    defence: str
    labels: float
    told: float = 0.0
    guessing: float = 0.0
    norm: float = 0.0
    attacks: tuple[Attack, ...] = ()
    update: Update | None = None

    @classmethod
    def of(cls, turn: Turn, defence: str, **found: Any) -> "Audit":
        """Return the audit of a turn whose device has this `defence`."""
        return cls(
            route=str(turn.route),
            cut=turn.route.segments[0].stop,
            codec=codec_name(turn.codec.uplink),
            defence=defence,
            **found,
        )

    @property
    def best(self) -> Attack | None:
        """The attack that reads most of what crosses the cut."""
        return max(self.attacks, key=lambda attack: attack.tokens, default=None)

    def most(self, domain: str) -> float | None:
        """Return the largest share that any attack with texts of `domain` reads."""
        return max((item.tokens for item in self.attacks if item.domain == domain), default=None)

    def sentence(self) -> str:
        """Return the result in words."""
        where = plain_text(f"{self.name} (cut {self.cut}, codec {self.codec}, {self.defence})")
        how = (
            "are sent to the server"
            if "device" not in self.route[6:]
            else ("can be read from the gradients that come back")
        )
        labels = f"{self.labels:.0%} of the labels {how}"
        best = self.best
        if best is None:
            return f"{where}: {labels}."
        helped = (
            ""
            if best.texts == 0
            else (f" with {best.texts} texts of its own, of {_DOMAINS[best.domain]},")
        )
        joined = max(item.joined for item in self.attacks)
        return (
            f"{where}: a curious server{helped} reads {best.tokens:.0%} of a private text's tokens "
            f"from the boundary ({best.attack}; guessing: {self.guessing:.0%}); {labels}, which "
            f"tell it {self.told:.0%} of the tokens; together {joined:.0%}.{self._of_update()}"
        )

    def _of_update(self) -> str:
        update = self.update
        if update is None:
            return ""
        if update.why_not:
            return (
                f" What adapters tell was not tried, a turn of this model fails: {update.why_not}."
            )
        return (
            f" From the adapters of a turn of {update.steps} steps the aggregator names "
            f"{update.tokens:.0%} of its {update.distinct} different tokens "
            f"(guessing: {update.guessing:.0%})."
        )


def write_audits(audits: Sequence[Audit], folder: Path, console: Console) -> None:
    """Write audit.json, audit.csv, audit.png and audit.pdf, and print a table."""
    summary = [
        {**asdict(item), "best": None if item.best is None else item.best.tokens} for item in audits
    ]
    write_atomically(folder / "audit.json", json_text({"audits": summary}))
    rows = [
        {
            **{
                key: value
                for key, value in asdict(item).items()
                if key not in ("attacks", "update")
            },
            **asdict(found),
        }
        for item in audits
        for found in item.attacks
    ]
    write_atomically(folder / "audit.csv", csv_text(rows))
    plot_audits(audits, [folder / "audit.png", folder / "audit.pdf"])
    console.print(audit_table(audits))
    console.print(f"[bold]{plain_text(folder)}[/bold]", highlight=False, soft_wrap=True)


def audit_table(audits: Sequence[Audit]) -> Table:
    """Return what each attack reads, as shares of private tokens."""
    table = Table(title="Share of private tokens read", title_justify="left")
    for heading in ("configuration", "cut", "codec", "defence", "attack", "own texts"):
        table.add_column(heading)
    for heading in ("tokens", "ROUGE-L", "with labels", "guessing"):
        table.add_column(heading, justify="right")
    for item in audits:
        head = [plain_text(item.name), str(item.cut), plain_text(item.codec), item.defence]
        for found in item.attacks:
            own = "none" if found.texts == 0 else f"{found.texts}, {found.domain} domain"
            shares = found.tokens, found.rouge_l, found.joined, item.guessing
            table.add_row(*head, found.attack, own, *(f"{share:.3f}" for share in shares))
            head = [""] * len(head)
        if not item.attacks:
            table.add_row(*head, "labels", "", "-", "-", f"{item.labels:.3f}", "-")
    return table


def plot_audits(audits: Sequence[Audit], paths: Sequence[Path]) -> None:
    """Draw the best attack's success over the cut, a line for each codec, defence and domain."""
    kinds = dict.fromkeys((item.codec, item.defence) for item in audits if item.attacks)
    lines = {}
    for codec, defence in kinds:
        for domain in ("same", "other"):
            points = sorted(
                (item.cut, share)
                for item in audits
                if (item.codec, item.defence) == (codec, defence)
                and (share := item.most(domain)) is not None
            )
            if points:
                lines[f"{codec}, {defence}, {_DOMAINS[domain]}"] = points
    with figure(paths, width_in=PAGE_IN, height_in=3 + 0.07 * len(lines)) as (_, axes):
        for (name, points), style in zip(lines.items(), styles(len(lines)), strict=True):
            axes.plot(*zip(*points, strict=True), label=name, **style)
        if lines:
            guessing = max(item.guessing for item in audits)
            axes.axhline(guessing, color="0.5", lw=0.8, label="guessing")
        axes.set(xlabel="blocks on the device", ylabel="tokens read by the best attack")
        axes.set_ylim(0, 1.02)
        legend(axes, columns=2)
