"""Plain Flower FedAvg with the training of `benchmarks.scale`, for comparison.

python -m benchmarks._scale_flower CHECKPOINT FOLDER DEVICES ROUNDS PLACES
"""

import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict, set_peft_model_state_dict

BATCH, TOKENS = 2, 16


@cache
def model_of(checkpoint: str) -> Any:
    """Return the model with fresh adapters, loaded once in a process."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def train(model: Any) -> float:
    """Train one step with a fresh optimizer; return the loss."""
    tokens = torch.randint(0, 100, (BATCH, TOKENS))
    trained = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def unsplit_ms(checkpoint: str, steps: int = 60) -> float:
    """Return the CPU milliseconds of a step in a process that does nothing else."""
    model = model_of(checkpoint)
    for _ in range(steps // 3):
        train(model)
    begun = time.process_time()
    for _ in range(steps):
        train(model)
    return (time.process_time() - begun) / steps * 1e3


class _Counted(FedAvg):
    """FedAvg that writes a line for each round."""

    def __init__(self, file: Path) -> None:
        super().__init__(fraction_evaluate=0.0)
        self._file = file

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        result = super().aggregate_train(server_round, replies)
        with self._file.open("a") as file:
            file.write(f"{server_round}\n")
        return result


def main() -> None:
    """Run the rounds; the file ``metrics.csv`` in the folder gets a line for each."""
    checkpoint, folder, devices, rounds, places = sys.argv[1:]
    client, server = ClientApp(), ServerApp()

    @client.train()
    def turn(message: Message, context: Context) -> Message:
        from benchmarks import _scale_flower as here  # the module of the actor, which keeps it

        model = here.model_of(checkpoint)
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        metrics = MetricRecord({"num-examples": BATCH, "loss": here.train(model)})
        trained = ArrayRecord(get_peft_model_state_dict(model))
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        file = Path(folder) / "metrics.csv"
        file.write_text("round\n")
        start = ArrayRecord(get_peft_model_state_dict(model_of(checkpoint)))
        _Counted(file).start(grid, start, num_rounds=int(rounds))

    run_simulation(
        server,
        client,
        num_supernodes=int(devices),
        backend_config={
            "init_args": {"num_cpus": int(places)},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
