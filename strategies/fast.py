"""Fast AI model splitting: in every round each device is cut where its turn takes least time."""

from dataclasses import replace

import numpy as np

from fedsplit.errors import require
from fedsplit.layergraph import LayerGraph
from fedsplit.plan import RoundPlan, Route, Turn
from fedsplit.planning import CutLimits, CutSolver, CutSystem
from fedsplit.schemes import Scene, Scheme
from fedsplit.wireless import downlink_bps, uplink_bps

_EMBEDDINGS = 1


class Fast(Scheme):
    """One branch of all devices in turn, each cut anew on the rates of the round.

    The cut is a minimum s-t cut of the model, here as its chain of blocks: what a turn costs on
    the device, on the server and on the radio link, adapters included. If nothing is gained by the
    server, the device keeps the whole model.

    Parameters
    ----------
    min_blocks : int
        Privacy floor: blocks that stay on the device at least.
    device_memory_bytes : float, optional
        Memory that a device's part may need; by default what the fleet says of each device.

    Notes
    -----
    Z. Li et al., "Fast AI Model Splitting over Edge Networks", arXiv 2507.01041, 2025; the memory
    limit, the privacy floor and the codec are additions.
    """

    def __init__(
        self,
        min_blocks: int = 1,
        device_memory_bytes: float | None = None,
    ) -> None:
        require(min_blocks >= 0, "strategy.min_blocks", min_blocks, "at least 0")
        memory = device_memory_bytes
        allowed = "null or above 0"
        require(memory is None or memory > 0, "strategy.device_memory_bytes", memory, allowed)
        self.min_blocks = min_blocks
        self.device_memory_bytes = device_memory_bytes

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Find each device's best cut with the whole band to itself."""
        chain = LayerGraph.from_profile(scene.profile)
        last_block, head = chain.n - 2, chain.n - 1
        # A server without a block cannot close a route: where the last block is, the head is too.
        pairs = [(last_block, head)]
        # Where the model cannot be cut behind c blocks, block c is on the device if those are.
        forbidden = sorted(set(range(scene.n_blocks)).difference(scene.cuts))
        pairs += [(_EMBEDDINGS + cut, _EMBEDDINGS + cut + 1) for cut in forbidden]
        solver = CutSolver(replace(chain, requires=np.array(pairs)))
        return RoundPlan.sequential(self._turn(scene, solver, device) for device in scene.devices)

    def _turn(self, scene: Scene, solver: CutSolver, device: int) -> Turn:
        fleet, channel, codec = scene.fleet, scene.channel, scene.codec
        system = CutSystem(
            device_flops_per_s=float(fleet.devices.flops[device]),
            server_flops_per_s=float(fleet.servers.flops[0]),
            uplink_bps=float(uplink_bps(channel, channel.uplink_hz, [device])[0]),
            downlink_bps=float(downlink_bps(channel, channel.downlink_hz, [device])[0]),
            steps=scene.work.steps_for(scene.samples[device]),
            batch=scene.work.batch_size,
            uplink_ratio=scene.codec_ratio(codec.uplink),
            downlink_ratio=scene.codec_ratio(codec.downlink),
        )
        memory = self.device_memory_bytes
        limits = CutLimits(
            float(fleet.devices.memory_bytes[device]) if memory is None else memory,
            self.min_blocks,
            on_device=(_EMBEDDINGS,),
        )
        cut = solver.solve(system, limits).n_blocks
        return scene.turn(device, Route.at_cut(scene.n_blocks, cut))
