"""How a run is carried out: the ``run`` group, and how long it goes on."""

from dataclasses import dataclass

from omegaconf import DictConfig

from fedsplit.errors import SettingsError, require
from fedsplit.mapping import from_mapping
from fedsplit.schemes.turnout import DROP, Waiting

from .link_config import RUN_LIMITS
from .values import plain, without

_MAX_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run is carried out on this machine, and how long it goes on.

    Parameters
    ----------
    rounds, evaluate_every : int
        Rounds in all, and between evaluations.
    concurrency : int
        Devices that run at once in a simulation.
    threads, server_threads : int
        Torch threads of a device and of the server.
    edge_nodes : bool
        Whether edge servers are Flower nodes of their own, not hosted by the server's process.
    accelerator : str
        ``auto``, ``cpu`` or a torch device.
    quorum : int
        Branches of a round that must survive, or the run stops.
    quorum_devices, late, staleness
        Whom a round waits for (`fedsplit.schemes.turnout.Waiting`).
    start_ahead : bool or None
        Whether the next device of a branch gets ready while the present one trains; None: between
        machines only, as it takes a place in a simulation.
    max_update_norm : float
        A turn whose adapters move farther than this, in the norm over all of them, is lost.
    engine : str
        What simulates the devices: ``embedded``, or Flower's own simulation on Ray, ``flower``.
    """

    rounds: int
    evaluate_every: int
    concurrency: int
    threads: int
    server_threads: int
    edge_nodes: bool
    accelerator: str
    quorum: int = 1
    quorum_devices: int | None = None
    late: str = DROP
    staleness: float = 0.5
    start_ahead: bool | None = None
    max_update_norm: float = 1e8
    engine: str = "embedded"

    def __post_init__(self) -> None:
        counts = ("rounds", "evaluate_every", "concurrency", "threads", "server_threads", "quorum")
        for name in counts:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _ = self.waiting
        require(self.max_update_norm > 0, "max_update_norm", self.max_update_norm, "above 0")
        for name, value in (("threads", self.threads), ("server_threads", self.server_threads)):
            require(value <= _MAX_THREADS, name, value, f"at most {_MAX_THREADS}")

    @property
    def waiting(self) -> Waiting:
        """Whom a round waits for."""
        return Waiting(quorum_devices=self.quorum_devices, late=self.late, staleness=self.staleness)


def run_settings(config: DictConfig) -> RunSettings:
    """Return how the run is carried out."""
    values = {"rounds": config.rounds, "evaluate_every": config.evaluate.every, **plain(config.run)}
    places = {"run.rounds": "rounds", "run.evaluate_every": "evaluate.every"}
    try:
        return from_mapping(RunSettings, without(values, RUN_LIMITS), "run")
    except SettingsError as error:
        raise SettingsError(
            places.get(error.field, error.field), error.value, error.allowed
        ) from error
