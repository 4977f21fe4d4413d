"""A fleet: which devices and servers there are, described in full or sampled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require, require_choice
from fedsplit.fleet.catalogue import DEVICES, SERVERS, Processor
from fedsplit.fleet.dropout import DropoutSpec
from fedsplit.seeds import generator

IntArray = NDArray[np.int64]


DISCIPLINES = ("fifo", "sharing", "partition", "unlimited")


@dataclass(frozen=True)
class ServingSpec:
    """How a server divides itself among the branches of a round.

    Parameters
    ----------
    discipline : str
        "fifo": one computation at a time, in order of arrival, as the stage server of a real run.
        "sharing": all present mini-batches at once, each at an equal share of the speed.
        "partition": each branch owns an equal part of the speed for the whole round (papers' GSFL,
        section 6 (b)). "unlimited": every branch has the full speed to itself.
    private_backbones : bool
        Whether every branch has its own copy of the frozen weights, as in SplitFed-v1, instead of
        sharing one. It counts for memory only.
    waiting_steps : int
        Mini-batches whose activations a "fifo" server keeps while they wait, between their forward
        and their backward pass, for the next tier or for the device of a U-shaped route. Others
        queue for a place.
    """

    discipline: str = "fifo"
    private_backbones: bool = False
    waiting_steps: int = 16

    def __post_init__(self) -> None:
        require_choice("fleet.serving.discipline", self.discipline, DISCIPLINES)
        places = self.waiting_steps
        require(places >= 1, "fleet.serving.waiting_steps", places, "at least 1")


@dataclass(frozen=True, eq=False, kw_only=True)
class Nodes:
    """Machines of one kind as arrays of shape ``[count]``.

    Parameters
    ----------
    names : tuple of str
        Type of each machine.
    clock_hz, min_hz : ndarray
        Highest and lowest clock.
    flops_per_cycle : ndarray
        FLOPs that a model really gets per cycle: the chip's peak times the utilisation.
    energy_coefficient : ndarray
        ``xi`` in ``P = xi f^3``, W/Hz^3.
    memory_bytes : ndarray
        Memory.
    positions_m : ndarray
        Shape ``[count, 2]``.
    """

    names: tuple[str, ...]
    clock_hz: Array
    min_hz: Array
    flops_per_cycle: Array
    energy_coefficient: Array
    memory_bytes: Array
    positions_m: Array

    def __len__(self) -> int:
        return len(self.names)

    @property
    def flops(self) -> Array:
        """FLOP/s at the highest clock, ``f delta sigma`` (papers' ``C``)."""
        return self.clock_hz * self.flops_per_cycle


@dataclass(frozen=True, eq=False, kw_only=True)
class Fleet:
    """Devices, the servers behind them, and how they hang together.

    Parameters
    ----------
    devices : Nodes
        The devices.
    servers : Nodes
        Index 0 is the cloud, or the only server of a two-tier scheme; 1.. are the edges.
    home : ndarray of int
        The edge that each device's radio link ends at, shape ``[N]``; all 0 without edges.
    samples : ndarray of int
        Training samples of each device, shape ``[N]``.
    backhaul_bps : float
        Rate between an edge and the cloud, each way.
    serving : ServingSpec
        How the servers divide themselves.
    length : ndarray, optional
        How long each device's texts are beside the profile's, which is what of their boundaries
        travels, shape ``[N]``; all alike by default.
    dropout : DropoutSpec
        Who leaves rounds.
    budget_j : ndarray or None
        What each device may spend in all on the modelled system, shape ``[N]``; None: anything.
    """

    devices: Nodes
    servers: Nodes
    home: IntArray
    samples: IntArray
    backhaul_bps: float
    serving: ServingSpec = ServingSpec()
    length: Array | None = None
    dropout: DropoutSpec = field(default_factory=DropoutSpec)
    budget_j: Array | None = None

    @property
    def n_devices(self) -> int:
        """Number of devices."""
        return len(self.devices)

    @property
    def n_edges(self) -> int:
        """Number of edge servers."""
        return len(self.servers) - 1

    @property
    def stations_m(self) -> Array:
        """Where radio links end, shape ``[edges, 2]``: at edges; without any, at the server.

        Device n's link ends at station ``home[n]``.
        """
        places = self.servers.positions_m
        return places[1:] if self.n_edges else places


@dataclass(frozen=True)
class DeviceSpec:
    """One device described by hand.

    Parameters
    ----------
    type : str
        A name of the catalogue or of `FleetSpec.processors`.
    position_m : tuple of float
        Where it stands.
    clock_hz : float or None
        Its highest clock; None means the type's.
    samples : int
        Its training samples.
    budget_j : float or None
        Energy that it may spend in all, on the modelled system; None: any.
    """

    type: str
    position_m: tuple[float, float]
    clock_hz: float | None = None
    samples: int = 100
    budget_j: float | None = None


@dataclass(frozen=True, kw_only=True)
class FleetSpec:
    """A fleet to build: sampled from a seed, or described device by device.

    Parameters
    ----------
    devices : int
        How many devices to sample.
    types : tuple of str
        Their types, dealt out in rotation, or drawn at random with ``types_by: random``.
    types_by : str
        "rotation" or "random".
    clock : tuple of float
        Range of a device's highest clock as a fraction of its type's, drawn uniformly.
    samples : tuple of int
        Range of training samples, drawn uniformly, both ends included.
    members : tuple of DeviceSpec
        Devices described by hand, as many as `devices`, in place of sampled ones.
    radius_m, min_distance_m : float
        Devices stand uniformly in a ring around their station.
    utilisation : float
        Part of the peak FLOP/s that a model really gets, on every machine.
    server : str
        Type of the cloud or only server; it stands at the origin.
    edges : int
        Number of edge servers; with none the scheme has two tiers.
    edge : str
        Their type. They stand evenly on a circle of `edge_ring_m` around the origin, and devices
        are dealt out to them in rotation.
    edge_ring_m : float
        Radius of that circle.
    backhaul_bps : float
        Rate between an edge and the cloud, each way.
    serving : ServingSpec
        How the servers divide themselves.
    dropout : DropoutSpec
        Who leaves rounds.
    budget_j : tuple of float or None
        Range of the energy that a device may spend in all on the modelled system, drawn uniformly;
        None: any. A device that a turn would bring above it takes no further part.
    processors : dict of str to Processor
        Types of your own, beside the catalogue's.
    """

    devices: int = 4
    types: tuple[str, ...] = ("jetson_orin_nano",)
    types_by: str = "rotation"
    clock: tuple[float, float] = (1.0, 1.0)
    samples: tuple[int, int] = (100, 100)
    members: tuple[DeviceSpec, ...] = ()
    radius_m: float = 250.0
    min_distance_m: float = 50.0
    utilisation: float = 1.0
    server: str = "rtx_4090"
    edges: int = 0
    edge: str = "rtx_4060_ti"
    edge_ring_m: float = 500.0
    backhaul_bps: float = 1e9
    serving: ServingSpec = field(default_factory=ServingSpec)
    dropout: DropoutSpec = field(default_factory=DropoutSpec)
    budget_j: tuple[float, float] | None = None
    processors: dict[str, Processor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("fleet.types_by", self.types_by, ("rotation", "random"))
        require(self.devices >= 1, "fleet.devices", self.devices, "at least 1")
        require(self.edges >= 0, "fleet.edges", self.edges, "at least 0")
        known = {**DEVICES, **SERVERS, **self.processors}
        require(len(self.types) > 0, "fleet.types", self.types, "at least one type")
        for name in self.types:
            require_choice("fleet.types", name, known)
        require_choice("fleet.server", self.server, known)
        require_choice("fleet.edge", self.edge, known)
        _require_range("fleet.clock", self.clock, 0.0, 1.0)
        _require_range("fleet.samples", self.samples, 0, 10**12)
        if self.budget_j is not None:
            _require_range("fleet.budget_j", self.budget_j, 0, 10**12)
        for name in ("radius_m", "backhaul_bps"):
            value = getattr(self, name)
            positive = math.isfinite(value) and value > 0
            require(positive, f"fleet.{name}", value, "finite and above 0")
        near = 0 <= self.min_distance_m <= self.radius_m
        allowed = f"from 0 to radius_m={self.radius_m}"
        require(near, "fleet.min_distance_m", self.min_distance_m, allowed)
        ring = self.edge_ring_m
        require(0 <= ring < math.inf, "fleet.edge_ring_m", ring, "finite and at least 0")
        require(0 < self.utilisation <= 1, "fleet.utilisation", self.utilisation, "in (0, 1]")
        given = len(self.members)
        fits = given in (0, self.devices)
        require(fits, "fleet.devices", self.devices, f"{given}, as many as fleet.members")
        for i, member in enumerate(self.members):
            place = f"fleet.members[{i}]"
            require_choice(f"{place}.type", member.type, known)
            finite = all(math.isfinite(x) for x in member.position_m)
            require(finite, f"{place}.position_m", member.position_m, "finite")
            require(member.samples >= 0, f"{place}.samples", member.samples, "at least 0")
            budget = member.budget_j
            allowed = "null, or at least 0"
            require(budget is None or budget >= 0, f"{place}.budget_j", budget, allowed)
            type_, clock = known[member.type], member.clock_hz
            require(
                clock is None or type_.min_hz <= clock <= type_.max_hz,
                f"{place}.clock_hz",
                clock,
                f"null or from {type_.min_hz:g} to {type_.max_hz:g} for {member.type}",
            )


def _require_range(name: str, pair: tuple[float, float], low: float, high: float) -> None:
    ordered = len(pair) == 2 and low <= pair[0] <= pair[1] <= high and pair[1] > low
    require(ordered, name, pair, f"two values, in order, from {low:g} to {high:g}")


def build_fleet(spec: FleetSpec, seed: int = 0) -> Fleet:
    """Build the fleet that `spec` describes.

    Parameters
    ----------
    spec : FleetSpec
        What to build.
    seed : int
        Root of the draws; types, clocks, places and data sizes come from one generator each, so
        changing one setting leaves the others' draws alone.
    """
    known = {**DEVICES, **SERVERS, **spec.processors}
    n_devices = spec.devices
    home = np.arange(n_devices) % max(spec.edges, 1)
    servers = _servers(spec, known)
    stations = servers.positions_m[1 + home if spec.edges else 0 * home]
    if spec.members:
        names = [member.type for member in spec.members]
        clock = np.array([m.clock_hz or known[m.type].max_hz for m in spec.members])
        samples = np.array([member.samples for member in spec.members])
        positions = np.array([member.position_m for member in spec.members], dtype=np.float64)
        if spec.edges:
            gaps = positions[:, None] - servers.positions_m[None, 1:]
            home = np.argmin(np.linalg.norm(gaps, axis=2), axis=1)
    else:
        if spec.types_by == "random":
            drawn = generator(seed, "fleet", "types").integers(len(spec.types), size=n_devices)
        else:
            drawn = np.arange(n_devices) % len(spec.types)
        names = [spec.types[i] for i in drawn]
        floor, top = (np.array([getattr(known[n], a) for n in names]) for a in ("min_hz", "max_hz"))
        fraction = generator(seed, "fleet", "clock").uniform(*spec.clock, n_devices)
        clock = np.maximum(fraction * top, floor)
        low, high = spec.samples
        samples = generator(seed, "fleet", "samples").integers(low, high + 1, n_devices)
        rng = generator(seed, "fleet", "positions")
        area = rng.uniform(spec.min_distance_m**2, spec.radius_m**2, n_devices)
        angle = rng.uniform(0, 2 * np.pi, n_devices)
        positions = stations + np.sqrt(area)[:, None] * np.stack(
            [np.cos(angle), np.sin(angle)], axis=1
        )
    budget_j = None
    if any(member.budget_j is not None for member in spec.members):
        given = [member.budget_j for member in spec.members]
        budget_j = np.array([math.inf if value is None else value for value in given])
    elif spec.budget_j is not None:
        budget_j = generator(seed, "fleet", "budget").uniform(*spec.budget_j, n_devices)
    devices = _nodes(names, known, clock, positions, spec.utilisation)
    return Fleet(
        devices=devices,
        servers=servers,
        home=home,
        samples=samples.astype(np.int64),
        backhaul_bps=spec.backhaul_bps,
        serving=spec.serving,
        dropout=spec.dropout,
        budget_j=budget_j,
    )


def _servers(spec: FleetSpec, known: dict[str, Processor]) -> Nodes:
    names = [spec.server, *[spec.edge] * spec.edges]
    angle = 2 * np.pi * np.arange(spec.edges) / max(spec.edges, 1)
    ring = spec.edge_ring_m * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    clock = np.array([known[name].max_hz for name in names])
    return _nodes(names, known, clock, np.concatenate([np.zeros((1, 2)), ring]), spec.utilisation)


def _nodes(
    names: Sequence[str],
    known: dict[str, Processor],
    clock_hz: Array,
    positions_m: Array,
    utilisation: float,
) -> Nodes:
    def column(attribute: str) -> Array:
        return np.array([getattr(known[name], attribute) for name in names], dtype=np.float64)

    return Nodes(
        names=tuple(names),
        clock_hz=clock_hz,
        min_hz=column("min_hz"),
        flops_per_cycle=utilisation * column("flops_per_cycle"),
        energy_coefficient=column("energy_coefficient"),
        memory_bytes=column("memory_bytes"),
        positions_m=positions_m,
    )
