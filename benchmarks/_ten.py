"""Processor time of planning with ten schemes on a model of 30 blocks."""

import os
import subprocess
import sys
import tempfile

TEN = (
    "splitfed", "vanilla", "fedlora", "sft", "fedsllm", "fast", "card", "gsfl", "cpsl", "joint",
)  # fmt: skip
PLAN_AIMS_S = {"first": 10.0, "after": 3.0}
_THIRTY_BLOCKS = (
    "model.source=null",
    "+model.model_type=llama",
    *(
        f"+model.config.{name}={value}"
        for name, value in {
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
        }.items()
    ),
)
# What `fedsplit plan -m` does, but for reading YAML and drawing: timed in a process of its own.
_PLAN_TEN = """
import sys, time
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import build_scenario
from fedsplit.apps.scenario import check_first_round
configs = [load_config([f"strategy={name}", *sys.argv[2:]]) for name in sys.argv[1].split(",")]
begin = time.process_time()
for config in configs:
    scenario = build_scenario(config)
    check_first_round(scenario.scheme, scenario.system)
    scenario.timeline(1)
print(time.process_time() - begin)
"""


def plan_cpu_s() -> dict[str, float]:
    """Time planning with ten schemes on a 30-block Llama: with an empty cache, then with it."""
    command = [sys.executable, "-c", _PLAN_TEN, ",".join(TEN), *_THIRTY_BLOCKS]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"FEDSPLIT_CACHE": folder}

        def once() -> float:
            ran = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True, timeout=900
            )
            return float(ran.stdout.split()[-1])

        return {"first": once(), "after": once()}
