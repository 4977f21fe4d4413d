"""Devices and servers, what they cost, and when everything in a round happens."""

from fedsplit.fleet.activities import Activity
from fedsplit.fleet.catalogue import DEVICES, SERVERS, Processor
from fedsplit.fleet.cost import (
    compute_delay_s,
    compute_energy_j,
    training_memory_bytes,
    transmit_energy_j,
)
from fedsplit.fleet.dropout import DropoutSpec
from fedsplit.fleet.export import cost_record, write_chrome_trace, write_gantt, write_json
from fedsplit.fleet.fleet import (
    DISCIPLINES,
    DeviceSpec,
    Fleet,
    FleetSpec,
    Nodes,
    ServingSpec,
    build_fleet,
)
from fedsplit.fleet.measured import measured_fleet
from fedsplit.fleet.stages import CodecRatio, SentBytes
from fedsplit.fleet.timeline import RoundCost, Timeline, timeline

__all__ = [
    "DEVICES",
    "DISCIPLINES",
    "SERVERS",
    "Activity",
    "CodecRatio",
    "DeviceSpec",
    "DropoutSpec",
    "Fleet",
    "FleetSpec",
    "Nodes",
    "Processor",
    "RoundCost",
    "SentBytes",
    "ServingSpec",
    "Timeline",
    "build_fleet",
    "compute_delay_s",
    "compute_energy_j",
    "cost_record",
    "measured_fleet",
    "timeline",
    "training_memory_bytes",
    "transmit_energy_j",
    "write_chrome_trace",
    "write_gantt",
    "write_json",
]
