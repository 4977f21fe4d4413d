"""All that fedsplit takes from the private corners of transformers and torch.

What may change with any release stands here, each with a way to do without it or an error that
says which release is needed; the rest of the package imports it from here.
"""

import collections
import contextlib
import logging as stdlib_logging
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

try:
    from torch._subclasses import FakeTensorMode
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
    )
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
except ImportError as error:
    raise ImportError(
        f"fedsplit needs torch>=2.6,<2.14; torch {torch.__version__} differs inside ({error})"
    ) from error

try:
    import transformers.cache_utils
    from transformers import PreTrainedModel, initialization
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        rename_source_key,
    )
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_utils import LoadStateDictConfig, _get_resolved_checkpoint_files
    from transformers.utils import logging
except ImportError as error:
    raise ImportError(
        f"fedsplit needs transformers>=5.20,<6; transformers {version('transformers')} differs "
        f"inside ({error})"
    ) from error

# PEFT imports it, and it warns of kernels that it can do without.
stdlib_logging.getLogger("bitsandbytes").setLevel(stdlib_logging.ERROR)

__all__ = [
    "GROUPED_MM",
    "BatchNorm",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensorMode",
    "GradientCheckpointingLayer",
    "Renamed",
    "SharedStates",
    "TorchDispatchMode",
    "checkpoint_files",
    "flop_registry",
    "guarded_initialisation",
    "initialise",
    "load_weights",
    "meta_model",
    "quiet_bars",
    "sdpa_backward_flop_count",
    "sdpa_flop_count",
    "tree_flatten",
    "tree_leaves",
    "tree_unflatten",
]

SharedStates: type[Any] = getattr(transformers.cache_utils, "KVSharingDict", collections.UserDict)
"""What earlier blocks leave keys and values in for later ones; before transformers 5.23 there was
no type of its own for it."""

GROUPED_MM: Any = getattr(torch.ops.aten, "_grouped_mm", None)
"""Matrix products of all experts at once; torch below 2.8 has none, and models loop instead."""


class Renamed:
    """How a checkpoint's names become a model's, as transformers renames and converts them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.mapping: list[Any] = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._expected = model.state_dict()

    def __call__(self, key: str) -> str | None:
        """Return the (first) weight that the stored tensor `key` goes to; None if there is none."""
        name, _ = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._expected
        )
        if name not in self._expected:
            name, _ = rename_source_key(key, [], [], self._prefix, self._expected)
        return name if name in self._expected else None


def load_weights(
    model: PreTrainedModel,
    stored: Mapping[str, Any],
    renamed: Renamed,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Any:
    """Put `stored` tensors (or slices of files) into `model` and say what did not fit.

    Returns
    -------
    LoadStateDictInfo
        Its missing_keys, unexpected_keys, mismatched_keys and conversion_errors, without the names
        that transformers itself ignores.
    """
    settings = LoadStateDictConfig(
        dtype=dtype, weight_mapping=renamed.mapping, device_map={"": device}
    )
    with quiet_bars():
        info, _ = convert_and_load_state_dict_in_model(model, dict(stored), settings)
    model._adjust_missing_and_unexpected_keys(info)
    return info


def checkpoint_files(source: str) -> list[str]:
    """Return the safetensors files of a checkpoint, downloaded if it is on the hub.

    Raises
    ------
    OSError or ValueError
        If there are none.
    """
    files, _ = _get_resolved_checkpoint_files(
        pretrained_model_name_or_path=source,
        variant=None,
        gguf_file=None,
        use_safetensors=True,
        user_agent=None,
        is_remote_code=False,
    )
    return list(files or [])


def meta_model(cls: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of class `cls` on the meta device, without memory."""
    with contextlib.ExitStack() as contexts:
        for context in cls.get_init_context(dtype, False, False, False):
            contexts.enter_context(context)
        return cls(config)


def guarded_initialisation() -> contextlib.AbstractContextManager[None]:
    """Return a context in which initialisation leaves loaded weights alone."""
    found: contextlib.AbstractContextManager[None] = initialization.guard_torch_init_functions()
    return found


def initialise(owner: PreTrainedModel, module: nn.Module) -> None:
    """Draw the weights of `module` that were not loaded, as the model `owner` does it."""
    owner._initialize_weights(module)


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Keep transformers' progress bar off the terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
