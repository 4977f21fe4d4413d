"""Experiment trackers that a run also writes to, through their own libraries.

Where their servers are and who may write there is told to them as they have it: environment
variables (``MLFLOW_TRACKING_URI``, ``WANDB_MODE``, ``WANDB_API_KEY`` ...) and login files.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedsplit.report.files import json_text, write_atomically

_ID = "tracker.json"


class Tracker(Protocol):
    """Takes the numbers of a run, round by round."""

    def log(self, values: Mapping[str, float], server_round: int) -> None:
        """Take the numbers of a round by name."""
        ...

    def close(self) -> None:
        """End the run there, as finished."""
        ...


def open_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """Return the tracker called `name` ("mlflow" or "wandb"), imported only now.

    A run that goes on is the same run there: its id stays in the folder.

    Parameters
    ----------
    name : str
        Which.
    folder : Path
        The run's output; its name is the run's.
    config : mapping
        The run's configuration, logged as parameters.
    """
    return _MlFlow(folder, config) if name == "mlflow" else _Wandb(folder, config)


class _MlFlow:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self._client = mlflow
        known = _known_id(folder, "mlflow")
        if known is None:
            mlflow.set_experiment("fedsplit")
            run = mlflow.start_run(run_name=folder.name)
            _keep_id(folder, "mlflow", run.info.run_id)
            mlflow.log_params(dict(_flat(config)))
        else:
            mlflow.start_run(run_id=known)

    def log(self, values: Mapping[str, float], server_round: int) -> None:
        self._client.log_metrics(dict(values), step=server_round)

    def close(self) -> None:
        self._client.end_run()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        known = _known_id(folder, "wandb")
        self._run = wandb.init(
            project="fedsplit",
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            id=known,
            resume="allow" if known else None,
        )
        _keep_id(folder, "wandb", str(self._run.id))

    def log(self, values: Mapping[str, float], server_round: int) -> None:
        self._run.log(dict(values), step=server_round, commit=True)

    def close(self) -> None:
        self._run.finish()


def _known_id(folder: Path, name: str) -> str | None:
    file = folder / _ID
    return json.loads(file.read_text()).get(name) if file.exists() else None


def _keep_id(folder: Path, name: str, run_id: str) -> None:
    write_atomically(folder / _ID, json_text({name: run_id}))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:500]
