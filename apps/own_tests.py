"""What the server itself measures of the global adapters: a test set of its own, and texts."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, MetricRecord
from torch import Tensor

from fedsplit.data import Samples, batches, draw, load_test
from fedsplit.execution import evaluate_turn
from fedsplit.execution.generation import Generation, generate
from fedsplit.flower import Job
from fedsplit.models import SplitModel, read_tokenizer
from fedsplit.models.names import IMAGES
from fedsplit.plan import Route
from fedsplit.report import Written
from fedsplit.seeds import generator

from .outputs import EvaluateSettings
from .records import scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OwnTests:
    """Evaluates on the server, which holds the whole model; nothing of it crosses a link.

    Parameters
    ----------
    settings : EvaluateSettings
        What is measured.
    work : Job
        The run's.
    model : SplitModel
        All segments.
    """

    def __init__(self, settings: EvaluateSettings, work: Job, model: SplitModel) -> None:
        self._settings = settings
        self._work = work
        self._model = model
        self.measured: dict[int, dict[str, float]] = {}

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase | None":
        source = self._work.model.source
        language = self._work.model.task != IMAGES and source is not None
        return read_tokenizer(str(source)) if language else None

    @cached_property
    def _samples(self) -> Samples:
        assert self._work.data is not None
        held = load_test(self._work.data, self._tokenizer, str(self._settings.central))
        rng = generator(self._work.seed, "evaluate", "central")
        return draw(held, self._settings.max_samples, rng)

    def central(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate on the server's test set, as Flower's strategies have it done."""
        if self._settings.central is None:
            return None
        work = self._work
        result = evaluate_turn(
            self._model,
            Route.device_only(self._model.n_blocks),
            batches(self._samples, work.batch_size),
            adapters=dict(arrays.to_torch_state_dict()),
            seed=work.seed,
        )
        right = None if result.n_correct is None else result.n_correct / result.n_targets
        more = scores(result.loss, right, work.model.task, self._settings.metrics)
        self.measured[server_round] = {"loss": result.loss, **more}
        return MetricRecord({"num-examples": result.n_samples, **self.measured[server_round]})

    def written(self, server_round: int, adapters: Mapping[str, Tensor]) -> tuple[Written, ...]:
        """Return what the model writes after the configured prompts, where the round is due."""
        settings, tokenizer = self._settings, self._tokenizer
        if not settings.prompts or server_round % settings.prompts_every or tokenizer is None:
            return ()
        assert self._work.data is not None
        texts = generate(
            self._model,
            tokenizer,
            self._work.data,
            settings.prompts,
            how=Generation(max_new_tokens=settings.max_new_tokens),
            adapters=adapters,
        )
        return tuple(map(Written, settings.prompts, texts))
