"""Situations to plan for, without a model: a profile by hand, a sampled fleet, a real channel."""

from collections.abc import Iterable
from dataclasses import replace

from fedsplit.fleet import FleetSpec, build_fleet
from fedsplit.profiles import ModelProfile, UnitProfile
from fedsplit.schemes import LocalWork, Scene
from fedsplit.wireless import Channel, ChannelSpec, MobilitySpec

N_BLOCKS = 6
MIXED = ("jetson_nano", "jetson_orin_nano", "jetson_agx_orin")


def profile() -> ModelProfile:
    """Return a model of six equal blocks: a block computes 3 MFLOP and holds 4 MB per sample."""
    unit = UnitProfile(1e6, 2e6, 8e6, 4e4, 8e4, 4e6, 1e5, 1e6)
    return ModelProfile(
        "by hand", 16, replace(unit, forward_flops=0, backward_flops=0), (unit,) * N_BLOCKS, unit
    )


def make_scene(
    devices: int = 6,
    *,
    edges: int = 0,
    seed: int = 0,
    server_round: int = 1,
    present: Iterable[int] | None = None,
    steps: int | None = 2,
    walking: bool = False,
    ring_m: float = 500.0,
) -> Scene:
    """Return a round of a mixed fleet with unequal data.

    Parameters
    ----------
    devices, edges : int
        Size of the fleet.
    seed : int
        Of every draw.
    server_round : int
        The round.
    present : iterable of int, optional
        Devices that take part; all by default.
    steps : int or None
        Mini-batches of a turn; None for an epoch.
    walking : bool
        Whether devices move between rounds.
    ring_m : float
        Distance of the edges from the centre, in metres.
    """
    spec = FleetSpec(
        devices=devices,
        edges=edges,
        edge_ring_m=ring_m,
        types=MIXED,
        clock=(0.3, 1),
        samples=(20, 200),
    )
    fleet = build_fleet(spec, seed)
    mobility = MobilitySpec(enabled=walking, side_m=400.0)
    positions = fleet.devices.positions_m
    channel = Channel(ChannelSpec(mobility=mobility), positions, fleet.stations_m, seed, fleet.home)
    samples = {
        device: int(fleet.samples[device])
        for device in (range(devices) if present is None else present)
    }
    return Scene(
        server_round=server_round,
        samples=samples,
        work=LocalWork(batch_size=4, steps=steps),
        profile=profile(),
        fleet=fleet,
        channel=channel.realise(server_round),
        mean_channel=channel.mean,
        seed=seed,
    )
