"""What is wrong with a model before anything starts: its files, its words, its sight."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from fedsplit.errors import FedsplitError, require
from fedsplit.models.adapters import add_adapters, is_adapter, peft_key
from fedsplit.models.anatomy import build_twin
from fedsplit.models.checkpoint import check_fit
from fedsplit.models.files import is_lfs_pointer, one_line, wrong
from fedsplit.models.lora import check_adapter
from fedsplit.models.names import CAUSAL, IMAGES
from fedsplit.models.private import meta_model
from fedsplit.models.quantise import require_bitsandbytes
from fedsplit.models.spec import ModelSpec, model_class
from fedsplit.models.tiny import example_inputs
from fedsplit.models.weights import build, weights_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
)
_OFFSET = ("Roberta", "XLMRoberta", "Camembert", "Data2VecText", "Xmod")
# Those count positions from behind the number of the padding token.
_SPECIAL = ("pad", "bos", "eos")


def check_model(spec: ModelSpec, seq_len: int | None = None) -> None:
    """Refuse a model that would train wrongly or fail later; no weight is read.

    Parameters
    ----------
    spec : ModelSpec
        The model.
    seq_len : int or None
        Tokens of a sample, of a text.

    Raises
    ------
    FedsplitError
        If a file is missing, cut off or not fetched; a weight is missing, left over, quantised or
        of another shape; or, of a language model, if it sees later tokens than the one it is to
        predict, has fewer positions than `seq_len`, or a tokenizer with special tokens that it has
        no embedding for.
    """
    if spec.source is not None:
        _refuse_pointers(spec.source)
    if spec.quantize is not None:
        require_bitsandbytes(spec.quantize)
    config = spec.load_config()
    if spec.source is not None:
        dtype = weights_dtype(spec, config)
        check_fit(meta_model(model_class(config, spec.task), config, dtype), spec, dtype)
    if spec.lora or spec.adapter is not None:
        check_adapters(spec, config)
    if spec.task == CAUSAL:
        check_sight(config)
    if spec.task != IMAGES:
        if seq_len is not None:
            check_positions(config, seq_len)
        if spec.source is not None:
            check_tokenizer(read_tokenizer(spec.source), spec.source, config)


def check_adapters(spec: ModelSpec, config: PretrainedConfig) -> None:
    """Refuse settings of LoRA that no module of the model answers to, and another's adapter.

    Raises
    ------
    FedsplitError
        Naming the setting, or the adapter's folder.
    """
    model = build(spec, config, lambda _: False)
    add_adapters(model, spec, lambda _: False)
    if spec.adapter is not None:
        named = model.named_parameters()
        check_adapter(spec, {peft_key(name): value for name, value in named if is_adapter(name)})


def read_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint.

    Raises
    ------
    FedsplitError
        If it has none, or its files are damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the Rust library raises bare ones
        raise wrong(
            source, f"must have a tokenizer that can be read ({one_line(str(error))[:300]})"
        ) from error
    return tokenizer


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", source: str, config: PretrainedConfig
) -> None:
    """Refuse a tokenizer whose special tokens have no embedding.

    Raises
    ------
    FedsplitError
        Naming the token and the size of the vocabulary.
    """
    size = int(config.get_text_config(decoder=True).vocab_size)
    for kind in _SPECIAL:
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None and not 0 <= token < size:
            raise wrong(
                source,
                f"its tokenizer's {kind}_token_id={token} must be below {size}, the size of the "
                f"model's vocabulary (vocab_size); set another {kind} token in "
                "tokenizer_config.json, or add rows to the embedding",
            )


def check_positions(config: PretrainedConfig, seq_len: int) -> None:
    """Refuse samples that are longer than the model.

    Raises
    ------
    FedsplitError
        Naming the field of the configuration that says how long it is.
    """
    text = config.get_text_config(decoder=True)
    for name in _POSITIONS:
        most = getattr(text, name, None)
        if isinstance(most, int) and most > 0:
            if type(text).__name__.startswith(_OFFSET):
                most -= (text.pad_token_id or 0) + 1
            require(seq_len <= most, "data.seq_len", seq_len, f"at most {most}, the model's {name}")
            return


def check_sight(config: PretrainedConfig) -> None:
    """Refuse a language model in which a token's scores depend on the tokens after it.

    Tried on a narrow twin: it would learn to copy the next token, to a loss of nothing.

    Raises
    ------
    FedsplitError
        Naming the architecture.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            # Not stirred: the decay of linear attention would change its sign, and look ahead.
            twin = build_twin(config, "causal-lm", stirred=False)
            ids = example_inputs(twin.config, "causal-lm")["input_ids"][:1]
            other = ids.clone()
            other[:, -1] = (other[:, -1] + 1) % 100 + 3
            before, after = (_scores(twin, row)[:, :-1] for row in (ids, other))
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as error:
        raise FedsplitError(
            f"model_type={config.model_type!r}: cannot be run on token ids alone "
            f"({one_line(str(error))[:200]})"
        ) from error
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        hint = "; set model.config.is_decoder=true" if hasattr(config, "is_decoder") else ""
        raise FedsplitError(
            f"model_type={config.model_type!r}: must not see later tokens than the one that it is "
            f"to predict, as a causal language model{hint}"
        )


def _scores(twin: torch.nn.Module, ids: Tensor) -> Tensor:
    scores: Tensor = twin(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return scores


def _refuse_pointers(source: str) -> None:
    """Refuse a folder in which Git LFS left notes in place of files."""
    folder = Path(source)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_lfs_pointer(path):
            raise wrong(
                source, f"{path.name} is a Git LFS pointer, not the file: fetch it (git lfs pull)"
            )
