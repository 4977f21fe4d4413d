"""What a language model writes after a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fedsplit.data import DataSpec, prompt_tokens
from fedsplit.errors import require
from fedsplit.execution.lane import compute
from fedsplit.models import SplitModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a text is written: the likeliest token each time, or drawn.

    Parameters
    ----------
    max_new_tokens : int
        Tokens that are written at most.
    sample : bool
        Whether tokens are drawn; the next three have no effect otherwise.
    temperature : float
        By which the logits are divided.
    top_k : int or None
        Draw among so many of the likeliest tokens.
    top_p : float
        Draw among the likeliest that have this probability together.
    seed : int
        Of the draws.

    Raises
    ------
    SettingsError
        If a value is out of range.
    """

    max_new_tokens: int = 64
    sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        most = self.max_new_tokens
        require(1 <= most <= 1 << 16, "max_new_tokens", most, "from 1 to 65536")
        heat = self.temperature
        require(0 < heat < float("inf"), "temperature", heat, "above 0 and finite")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or null")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "from 0 to 2^63 - 1")


def generate(
    model: SplitModel,
    tokenizer: "PreTrainedTokenizerBase",
    data: DataSpec,
    prompts: Sequence[str],
    *,
    how: Generation,
    adapters: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Return what the whole `model` writes after each of `prompts`, special tokens left out.

    Parameters
    ----------
    model : SplitModel
        Holds all segments.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    data : DataSpec
        What it was trained on: prompts become tokens as they did there.
    prompts : sequence of str
        One text each; they do not depend on each other.
    how : Generation
        How.
    adapters : mapping of str to Tensor, optional
        What is trained; by default, what is installed.

    Raises
    ------
    FedsplitError
        If a prompt makes no token, or the chat template refuses it.
    """
    asked = [prompt_tokens(tokenizer, data, prompt) for prompt in prompts]
    settings = _settings(model, tokenizer, how)
    if adapters is not None:
        compute(lambda: model.put(adapters))

    def write(tokens: list[int]) -> str:
        return compute(lambda: _write(model, tokenizer, tokens, settings, how))

    return [write(tokens) for tokens in asked]


def _write(
    model: SplitModel,
    tokenizer: "PreTrainedTokenizerBase",
    tokens: list[int],
    settings: GenerationConfig,
    how: Generation,
) -> str:
    inner: Any = model.eval().model
    ids = torch.tensor([tokens], device=inner.device)
    gpus = [inner.device] if inner.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=gpus):
        torch.manual_seed(how.seed)
        mask = torch.ones_like(ids)
        written = inner.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return str(tokenizer.decode(written[0, len(tokens) :], skip_special_tokens=True))


def _settings(
    model: SplitModel, tokenizer: "PreTrainedTokenizerBase", how: Generation
) -> GenerationConfig:
    """Return `how` as transformers takes it; nothing of what a checkpoint would rather have."""
    ends = {tokenizer.eos_token_id, *_as_list(getattr(model.config, "eos_token_id", None))}
    stops = sorted(int(token) for token in ends if token is not None)
    drawn = {"temperature": how.temperature, "top_k": how.top_k or 0, "top_p": how.top_p}
    padding = tokenizer.pad_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=how.max_new_tokens,
        do_sample=how.sample,
        eos_token_id=stops or None,
        pad_token_id=padding if padding is not None else (stops or [0])[0],
        use_cache=True,
        **(drawn if how.sample else {}),
    )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
