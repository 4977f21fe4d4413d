"""Fleets of the catalogue in a cell of 20 MHz, and what they have to plan."""

import numpy as np

from fedsplit.fleet import FleetSpec, build_fleet
from fedsplit.planning import (
    CodecTable,
    CutCosts,
    SftProblem,
    ShannonPool,
    devices_of,
    downlink_efficiency,
    server_of,
    uplink_snr_hz,
)
from fedsplit.profiles import ModelProfile, UnitProfile
from fedsplit.seeds import generator
from fedsplit.wireless import Channel, ChannelSpec, ChannelState

BATCH, STEPS = 64, 10

# A block of ViT-B/16 with rank-16 LoRA for one image of 197 tokens, fp32.
_BLOCK = UnitProfile(
    forward_flops=2.91e9,
    backward_flops=3.0e9,
    parameter_bytes=4 * 7.28e6,
    adapter_bytes=4 * 196.6e3,
    activation_bytes=2.1e7,
    boundary_bytes=4 * 197 * 768,
)
VIT = ModelProfile(
    "vit-b/16",
    197,
    UnitProfile(forward_flops=2.3e8, parameter_bytes=3e6, boundary_bytes=4 * 197 * 768),
    (_BLOCK,) * 12,
    UnitProfile(forward_flops=1.5e5, backward_flops=1.5e5, parameter_bytes=3e5),
)


def codec_table(settings: int) -> CodecTable:
    """Return settings whose loss falls exponentially with the ratio, in place of measured ones."""
    ratio = np.geomspace(0.03, 0.6, settings)
    names = tuple({"name": "topk", "row": row} for row in range(settings))
    return CodecTable(ratio, 0.4 * np.exp(-8 * ratio), names)


def cell(devices: int, seed: int) -> ChannelState:
    """Return the channel of a round in a cell of 20 MHz."""
    fleet = build_fleet(FleetSpec(devices=devices), seed)
    places = fleet.devices.positions_m
    channel = Channel(ChannelSpec(), places, fleet.stations_m, seed, fleet.home)
    return channel.realise(0)


def sft_problem(devices: int, seed: int, blocks: int = 12, settings: int = 12) -> SftProblem:
    """Return a fleet of the catalogue that fine-tunes ViT-B/16."""
    fleet = build_fleet(FleetSpec(devices=devices), seed)
    state = cell(devices, seed)
    profile = ModelProfile(VIT.name, VIT.seq_len, VIT.embed, VIT.blocks[:blocks], VIT.head)
    server = server_of(fleet)
    return SftProblem(
        costs=CutCosts.from_profile(profile, BATCH),
        devices=devices_of(fleet, STEPS),
        table=codec_table(settings),
        max_loss_increase=0.1,
        uplink_snr_hz=uplink_snr_hz(state),
        downlink_efficiency=downlink_efficiency(state),
        uplink_hz=state.uplink_hz,
        downlink_hz=state.downlink_hz,
        server_flops_per_s=server.max_hz * server.flops_per_cycle / devices,
        data_weights=fleet.samples,
        compress_gradients=True,
    )


def uplinks(users: int, seed: int) -> tuple[list[ShannonPool], np.ndarray]:
    """Return users of a cell that send 0.5 to 2 Mbit after computing for up to 2 s."""
    state, rng = cell(users, seed), generator(seed, "benchmark", users)
    bits = rng.uniform(0.5, 2.0, users) * 1e6
    pool = ShannonPool(bits, uplink_snr_hz(state), state.uplink_hz)
    return [pool], rng.uniform(0.0, 2.0, users)
