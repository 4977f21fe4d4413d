"""Frozen weights in 8 or 4 bits, by bitsandbytes: made piece by piece, while a segment is loaded.

Quantised are the linear layers of the blocks and the embedding of the tokens; not the head (as
transformers leaves it), nor what is trained. Every piece is quantised by itself: rows with int8,
runs of 64 numbers with nf4. So a weight does not depend on which segment holds it.
"""

import ctypes
import importlib
import importlib.util
import mmap
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedsplit.errors import FedsplitError
from fedsplit.models.blocks import find_blocks
from fedsplit.models.checkpoint import Owns
from fedsplit.models.names import INT8, NF4
from fedsplit.models.phantoms import phantom

_CHUNK_BYTES = 1 << 20
_RUN = 64
_DROP_PAGES = 4  # MADV_DONTNEED


def require_bitsandbytes(quantize: str) -> None:
    """Refuse to quantise without the library.

    Raises
    ------
    FedsplitError
        If it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FedsplitError(
            f"quantize={quantize!r}: needs bitsandbytes: pip install 'fedsplit[quantize]'"
        )


def quantise(model: PreTrainedModel, kind: str, owns: Owns, spared: frozenset[str]) -> None:
    """Replace the frozen weights of `model` that ``owns(name)``, one at a time.

    Parameters
    ----------
    model : PreTrainedModel
        With its weights in memory, or mapped from files; before adapters are put around them.
    kind : str
        "int8" or "nf4".
    owns : callable
        Whether a module runs here; phantoms of others stay.
    spared : frozenset of str
        Last parts of the names of modules that stay as they are.

    Notes
    -----
    Dettmers et al., "LLM.int8()", NeurIPS 2022; "QLoRA", NeurIPS 2023.
    """
    require_bitsandbytes(kind)
    bnb = importlib.import_module("bitsandbytes")
    blocks = tuple(f"{name}." for name in find_blocks(model))
    embedding = model.get_input_embeddings()
    shared = _untie(model, owns)
    for name, module in list(model.named_modules()):
        inside = name.startswith(blocks) and type(module) in (nn.Linear, Conv1D)
        if name.rpartition(".")[2] in spared or not (inside or module is embedding):
            continue
        if owns(name) and type(module) in (nn.Linear, Conv1D, nn.Embedding):
            parent, _, short = name.rpartition(".")
            made = _quantised(bnb, module, kind, keep=shared and module is embedding)
            setattr(model.get_submodule(parent), short, made)
    setattr(model, "is_loaded_in_8bit" if kind == INT8 else "is_loaded_in_4bit", True)


def _untie(model: PreTrainedModel, owns: Owns) -> bool:
    """Part an embedding from a head tied to it; return whether both are here, and still share."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or head is embedding or head.weight is not embedding.weight:
        return False
    names = {module: name for name, module in model.named_modules()}
    here = {module: owns(names[module]) for module in (embedding, head)}
    for module, own in here.items():
        if not own:
            module.weight = nn.Parameter(phantom(module.weight), requires_grad=False)
    return all(here.values())


def _quantised(bnb: Any, module: nn.Module, kind: str, *, keep: bool) -> Any:
    """Return `module` with quantised weights; it gives back its own, unless they are to `keep`."""
    weight = cast("Tensor", module.weight).detach()
    if isinstance(module, Conv1D):
        weight = weight.t()
    size = weight.numel()
    if kind == INT8:
        data, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    else:
        data = torch.empty((-(-size // 2), 1), dtype=torch.uint8)
        scale = torch.empty(-(-size // _RUN))
    there = scaled = 0
    for piece, part, scales in _pieces(bnb, weight, kind):
        data[there : there + len(part)] = part
        scale[scaled : scaled + len(scales)] = scales
        there, scaled = there + len(part), scaled + len(scales)
        if not keep:
            give_back(piece)
        _trim()
    made = _empty_like(bnb, module, weight, kind)
    made.weight = _parameter(bnb, data, scale, weight, kind, made)
    made.train(module.training)
    return made


def _pieces(bnb: Any, weight: Tensor, kind: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield some rows after the other, with the numbers and scales that they become."""
    rows = max(1, _CHUNK_BYTES // (weight[0].nbytes * _RUN)) * _RUN
    for piece in weight.split(rows):  # type: ignore[no-untyped-call]
        if kind == INT8:
            made: Any = bnb.nn.Int8Params(piece.contiguous(), requires_grad=False).to("cpu")
            yield piece, made.data, made.SCB
        else:
            found, state = bnb.functional.quantize_4bit(
                piece.contiguous(), blocksize=_RUN, quant_type=NF4
            )
            yield piece, found, state.absmax


def _parameter(
    bnb: Any, data: Tensor, scale: Tensor, weight: Tensor, kind: str, module: nn.Module
) -> Any:
    if kind == INT8:
        return bnb.nn.Int8Params(data, requires_grad=False, CB=data, SCB=scale)
    code = bnb.functional.get_4bit_type(NF4, device="cpu")
    state = bnb.functional.QuantState(
        absmax=scale,
        shape=weight.shape,
        code=code,
        blocksize=_RUN,
        quant_type=NF4,
        dtype=weight.dtype,
    )
    return bnb.nn.Params4bit(
        data,
        quant_state=state,
        blocksize=_RUN,
        compress_statistics=False,
        quant_type=NF4,
        module=module,
        bnb_quantized=True,
    )


def _empty_like(bnb: Any, module: nn.Module, weight: Tensor, kind: str) -> Any:
    """Return the library's module in place of `module`, without weights, with its bias."""
    wide, dtype = weight.shape, weight.dtype
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            embedding = _embedding(bnb.nn.Embedding8bit if kind == INT8 else bnb.nn.Embedding4bit)
            more = {} if kind == INT8 else {"quant_type": NF4}
            return embedding(wide[0], wide[1], dtype=dtype, **more)
        if kind == INT8:
            made = bnb.nn.Linear8bitLt(wide[1], wide[0], bias=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(
                wide[1],
                wide[0],
                bias=False,
                compute_dtype=dtype,
                compress_statistics=False,
                quant_type=NF4,
            )
    made.bias = module.bias
    return made


def _embedding(base: Any) -> Any:
    """Return the library's embedding as one that may be asked for its state."""
    return type(base.__name__, (base,), {"_save_to_state_dict": nn.Module._save_to_state_dict})


def quantised_bytes(model: nn.Module) -> int:
    """Return the bytes of scales that `model` holds beside its parameters."""
    found = 0
    for module in model.modules():
        weight = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        scales = [
            getattr(weight, "SCB", None),
            getattr(getattr(module, "state", None), "SCB", None),
        ]
        scales.append(None if state is None else state.absmax)
        found += sum(scale.nbytes for scale in scales if isinstance(scale, Tensor))
    return found


def is_quantised(module: nn.Module) -> bool:
    """Return whether the weight of `module` is one of bitsandbytes'."""
    return type(module._parameters.get("weight")).__module__.startswith("bitsandbytes")


def give_back(tensor: Tensor) -> None:
    """Free the memory of a tensor whose values nobody reads again.

    A checkpoint's pages stay in memory as long as its files are mapped, which is as long as any
    tensor of them is held; so the system is told of each. Without effect where it cannot be told.
    """
    if sys.platform != "linux" or not tensor.is_contiguous() or tensor.device.type != "cpu":
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(_DROP_PAGES)
            )


def _trim() -> None:
    """Give back what is free (glibc): holes that the library's temporaries leave add up to a tenth.

    Without effect where the C library is another.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
