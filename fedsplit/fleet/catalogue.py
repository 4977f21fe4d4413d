"""Known processors of devices and servers, each with where its figures come from.

`source` says how far a figure may be trusted: "read" figures were read in the source named,
"remembered" ones are the makers' public figures as commonly quoted, not checked against the data
sheet. FLOPs per cycle count one fused multiply-add per FP32 core as two; matrix units
are not counted, so pick `flops_per_cycle` of your own for mixed precision.
"""

import math
from dataclasses import dataclass

from fedsplit.errors import require

_GB = 1e9


@dataclass(frozen=True)
class Processor:
    """A type of device or server.

    Parameters
    ----------
    flops_per_cycle : float
        Peak FLOPs per clock cycle of the whole chip (papers' delta x sigma).
    min_hz, max_hz : float
        Clock range.
    memory_bytes : float
        Memory for the model.
    power_w : float
        Power at the highest clock; sets the energy coefficient.
    source : str
        Where the figures come from.

    Raises
    ------
    FedsplitError
        If a figure is not finite and positive, or the clock range is empty.
    """

    flops_per_cycle: float
    min_hz: float
    max_hz: float
    memory_bytes: float
    power_w: float
    source: str = "given in the configuration"

    def __post_init__(self) -> None:
        for name in ("flops_per_cycle", "min_hz", "max_hz", "memory_bytes", "power_w"):
            value = getattr(self, name)
            positive = math.isfinite(value) and value > 0
            require(positive, f"processor.{name}", value, "finite and above 0")
        ordered = self.min_hz <= self.max_hz
        require(ordered, "processor.min_hz", self.min_hz, f"at most max_hz={self.max_hz:g}")

    @property
    def energy_coefficient(self) -> float:
        """``xi`` of the DVFS law ``P = xi f^3`` in W/Hz^3; P at `max_hz` is `power_w`."""
        return self.power_w / self.max_hz**3


_NVIDIA = "remembered: NVIDIA data sheets"
_JETSON = "remembered: NVIDIA Jetson data sheets"

DEVICES = {
    "jetson_nano": Processor(2 * 128, 0.0768e9, 0.92e9, 4 * _GB, 10, _JETSON),
    "jetson_tx2": Processor(2 * 256, 0.114e9, 1.3e9, 8 * _GB, 15, _JETSON),
    "jetson_xavier_nx": Processor(2 * 384, 0.114e9, 1.1e9, 8 * _GB, 20, _JETSON),
    "jetson_orin_nano": Processor(
        2 * 1024,
        0.05e9,
        0.625e9,
        8 * _GB,
        15,
        "clock range read: arXiv 2608.17849, section VII; cores, memory, power " + _JETSON,
    ),
    "jetson_orin_nx": Processor(2 * 1024, 0.306e9, 0.918e9, 16 * _GB, 25, _JETSON),
    "jetson_agx_orin": Processor(2 * 2048, 0.306e9, 1.3e9, 64 * _GB, 60, _JETSON),
    "snapdragon_8_gen2": Processor(
        2 * 2560,
        0.22e9,
        0.68e9,
        12 * _GB,
        7.5,
        "read: 0.68 GHz, 3.48 TFLOP/s (cputronic.com), 7.5 W under 3DMark (mixzhare.com); "
        "remembered: lowest clock, memory",
    ),
    "apple_a16": Processor(
        2 * 640,
        0.4e9,
        1.398e9,
        6 * _GB,
        7.6,
        "read: 1.398 GHz, 1.79 TFLOP/s (cputronic.com), 7.6 W under 3DMark (mixzhare.com); "
        "remembered: lowest clock, memory",
    ),
}

SERVERS = {
    "rtx_4060_ti": Processor(2 * 4352, 0.21e9, 2.535e9, 16 * _GB, 160, _NVIDIA),
    "rtx_4090": Processor(
        2 * 16384,
        0.21e9,
        3.135e9,
        24 * _GB,
        450,
        "clock range read: arXiv 2608.17849, section VII; cores, memory, power " + _NVIDIA,
    ),
    "rtx_a6000": Processor(2 * 10752, 0.21e9, 1.8e9, 48 * _GB, 300, _NVIDIA),
    "a100": Processor(
        2 * 6912,
        0.21e9,
        1.41e9,
        80 * _GB,
        400,
        "read: 6912 cores, 80 GB, 19.5 TFLOP/s FP32, 400 W (glennklockwood.com, citing NVIDIA); "
        "remembered: lowest clock",
    ),
    "h100": Processor(
        2 * 16896,
        0.21e9,
        1.98e9,
        80 * _GB,
        700,
        "read: 16896 cores, 1.98 GHz, 80 GB, 66.9 TFLOP/s FP32, 700 W (glennklockwood.com, "
        "citing NVIDIA); remembered: lowest clock",
    ),
}
