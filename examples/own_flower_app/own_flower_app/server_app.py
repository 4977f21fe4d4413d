"""The server: any Flower strategy, over devices that hold the first blocks only."""

from fedsplit.strategies.splitfed import SplitFed
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedsplit.assets import default_checkpoint
from fedsplit.execution import OptimizerSpec
from fedsplit.flower import Job, SplitStrategy
from fedsplit.models import ModelSpec

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Fine-tune a model of the hub, or of a folder; here, the one that ships with fedsplit."""
    settings = context.run_config
    job = Job(
        model=ModelSpec(source=str(default_checkpoint()), r=8, alpha=16),
        n_devices=int(settings["devices"]),
        optimizer=OptimizerSpec(lr=1e-2),
        batch_size=8,
    )
    strategy = SplitStrategy(SplitFed(cut=int(settings["cut"])), inner=FedAvg(), job=job)
    result = strategy.start(grid, num_rounds=int(settings["num-rounds"]))
    for server_round, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {server_round}: evaluation loss {metrics['loss']:.4f}")
    assert result.arrays is not None  # the adapters, as Flower's ArrayRecord
