"""Find the blocks of a model: the places where it can be cut."""

from torch import nn
from transformers import PreTrainedModel

from fedsplit.errors import FedsplitError
from fedsplit.models.private import GradientCheckpointingLayer

_DEPTH_FIELDS = ("num_hidden_layers", "decoder_layers", "n_layer", "n_layers", "num_layers")


def find_blocks(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the module names of `model`'s blocks, in the order they run.

    The blocks are the longest list of checkpointable layers in the decoder that is not itself
    inside such a layer; for networks made of stages (ResNet), the layers of all stages.

    Raises
    ------
    FedsplitError
        If there is no such list.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    names = {module: name for name, module in model.named_modules()}
    if decoder not in names or not isinstance(decoder, PreTrainedModel):
        decoder = model
    depths = _depths(model)
    for candidates in (_lists_of_layers(decoder), _lists_of_layers(decoder, nn.Module)):
        exact = [module for module in candidates if len(module) in depths]
        if len(exact) == 1:
            return tuple(names[item] for item in exact[0])
    staged = _staged_layers(decoder)
    if staged:
        return tuple(names[item] for item in staged)
    raise FedsplitError(
        f"model_type={model.config.model_type!r}: no list of blocks was found, so it cannot be cut"
    )


def _depths(model: PreTrainedModel) -> set[int]:
    """Return the numbers of blocks that the configuration states."""
    config = model.config.get_text_config(decoder=True)
    values = [getattr(config, field, None) for field in _DEPTH_FIELDS]
    return {value for value in values if isinstance(value, int)}


def _lists_of_layers(
    model: nn.Module, kind: type[nn.Module] = GradientCheckpointingLayer
) -> list[nn.ModuleList]:
    """Return the lists of `kind` in `model` that are not inside an item of another such list."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(item, kind) for item in module)
    ]
    nested = {
        inner for outer in lists for item in outer for inner in item.modules() if inner in lists
    }
    return [module for module in lists if module not in nested]


def _staged_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of all stages of an encoder made of `stages`, each a chain `layers`."""
    for module in model.modules():
        stages = getattr(module, "stages", None)
        if isinstance(stages, nn.ModuleList) and all(
            isinstance(getattr(stage, "layers", None), nn.Sequential | nn.ModuleList)
            for stage in stages
        ):
            return [layer for stage in stages for layer in stage.get_submodule("layers").children()]
    return []
