"""Texts, pairs and conversations to token samples."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from fedsplit.data import chat
from fedsplit.data.counts import Counts
from fedsplit.data.examples import Chat, Example, Labelled, Pair, Picture, Text
from fedsplit.data.samples import IGNORED, TokenSamples
from fedsplit.data.spec import DataSpec
from fedsplit.errors import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 64  # texts: what a tokenizer says of each takes far more memory than its tokens

SOMEONE = "one of the devices has to train or test on"

Encoded = tuple[list[int], list[bool]]
"""Tokens of an example, and which of them are learnt."""


def pack(
    texts: Sequence[Text],
    tokenizer: "PreTrainedTokenizerBase",
    seq_len: int,
    *,
    to_longest: bool = False,
    whose: str = SOMEONE,
) -> TokenSamples:
    """Join texts and cut them in full samples; what is left over at the end is dropped.

    Each document begins and ends with the tokens that the tokenizer has for it. Texts that do not
    fill a sample make one that is padded.
    """
    begin, end = begin_of_text(tokenizer), end_of_text(tokenizer)
    stream: list[int] = []
    dropped = 0
    fresh = True
    for text, tokens in zip(texts, _tokens_of(texts, tokenizer), strict=True):
        if not tokens:
            dropped += 1
            continue
        stream += begin + tokens if fresh else tokens
        fresh = text.ends
        if text.ends:
            stream += end
    require(
        len(stream) >= 2,
        "data.path",
        ", ".join(dict.fromkeys(text.file for text in texts)),
        f"text of 2 tokens at least; there are {len(stream)} that {whose}",
    )
    counts = Counts(read=len(texts), dropped=dropped)
    if len(stream) < seq_len:
        counts = replace(counts, samples=1, tokens=len(stream), longest=len(stream))
        short = _stack([(stream, [True] * len(stream))], seq_len, tokenizer)
        return TokenSamples(short, counts, to_longest=to_longest)
    n_samples = len(stream) // seq_len
    ids = torch.tensor(stream[: n_samples * seq_len]).view(n_samples, seq_len)
    counts = replace(
        counts,
        samples=n_samples,
        tokens=ids.numel(),
        longest=seq_len,
        left_over=len(stream) - ids.numel(),
    )
    return TokenSamples({"input_ids": ids, "labels": ids}, counts)


def _tokens_of(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """Yield the tokens of each text; one by one, a call costs more than what it does."""
    for start in range(0, len(texts), _AT_ONCE):
        chosen = [text.text for text in texts[start : start + _AT_ONCE]]
        yield from tokenizer(chosen, add_special_tokens=False, verbose=False).input_ids


def pad(
    examples: Sequence[Pair] | Sequence[Chat],
    tokenizer: "PreTrainedTokenizerBase",
    spec: DataSpec,
    *,
    whose: str = SOMEONE,
) -> TokenSamples:
    """Put each pair or conversation in one sample, cut or padded on the right to `spec.seq_len`.

    One of which nothing is learnt, since its prompt alone fills the sample, is left out. With
    `spec.packing` a sample holds as many as fit, each with positions of its own (`position_ids`).
    """
    encode = encoder(examples[0], tokenizer, spec)
    seq_len = spec.seq_len
    rows: list[Encoded] = []
    cut = 0
    shortest: int | None = None
    for tokens, learnt in map(encode, examples):
        first = _first_target(learnt)
        if first is None:
            continue
        shortest = first if shortest is None else min(first, shortest)
        if first < seq_len:
            rows.append((tokens[:seq_len], learnt[:seq_len]))
            cut += len(tokens) > seq_len
    least = "with something to learn" if shortest is None else f"above {shortest}"
    require(
        len(rows) > 0,
        "data.seq_len",
        seq_len,
        f"{least}, longer than the shortest prompt of the {len(examples)} that {whose}",
    )
    together = share_rows(rows, seq_len) if spec.packing else [[row] for row in rows]
    joined = [_joined(group) for group in together] if spec.packing else rows
    tensors = _stack(joined, seq_len, tokenizer)
    if spec.packing:
        tensors["position_ids"] = torch.stack([_places(group, seq_len) for group in together])
    counts = _counts(len(examples), [len(tokens) for tokens, _ in joined], cut)
    counts = replace(counts, dropped=len(examples) - len(rows))
    return TokenSamples(tensors, counts, to_longest=spec.padding == "longest")


def share_rows(rows: Sequence[Encoded], seq_len: int) -> list[list[Encoded]]:
    """Return `rows` in groups of at most `seq_len` tokens in all, the longest first.

    Each goes where the least room is left that it fits in (best fit decreasing).
    """
    groups: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # left in a group, and which; ascending
    for row in sorted(rows, key=lambda row: -len(row[0])):
        place = bisect_left(room, (len(row[0]), 0))
        if place == len(room):
            left, group = seq_len, len(groups)
            groups.append([])
        else:
            left, group = room.pop(place)
        groups[group].append(row)
        insort(room, (left - len(row[0]), group))
    return groups


def _joined(group: Sequence[Encoded]) -> Encoded:
    """Return examples one behind the other; nothing predicts the first token of one."""
    tokens = [token for own, _ in group for token in own]
    return tokens, [own and place > 0 for _, learnt in group for place, own in enumerate(learnt)]


def _places(group: Sequence[Encoded], seq_len: int) -> torch.Tensor:
    """Return each example's positions, and those of the padding, which count from 0 as well."""
    lengths = [len(tokens) for tokens, _ in group]
    return torch.cat([torch.arange(n) for n in (*lengths, seq_len - sum(lengths))])


def classify(
    examples: Sequence[Labelled],
    tokenizer: "PreTrainedTokenizerBase",
    spec: DataSpec,
    *,
    whose: str = SOMEONE,
) -> TokenSamples:
    """Put each text or pair of texts in one sample, its class beside it.

    With the tokens that the tokenizer puts around and between texts; where it has none to put
    between, that is a line's end. Empty texts are left out; too long ones are cut as the tokenizer
    does it.
    """
    rows: list[dict[str, list[int]]] = []
    labels: list[int] = []
    cut = 0
    for example in examples:
        texts = [text for text in (example.text, example.second) if text is not None]
        if tokenizer.sep_token_id is None:
            texts = ["\n".join(texts)]
        if not any(text.strip() for text in texts):
            continue
        whole = tokenizer(*texts, verbose=False)
        if len(whole.input_ids) > spec.seq_len:
            cut += 1
            whole = tokenizer(*texts, truncation=True, max_length=spec.seq_len)
        rows.append(
            {name: whole[name] for name in ("input_ids", "token_type_ids") if name in whole}
        )
        labels.append(example.group)
    require(len(rows) > 0, "data.path", spec.path, f"texts that are not empty, that {whose}")
    lengths = [len(row["input_ids"]) for row in rows]
    counts = _counts(len(examples), lengths, cut)
    learnt_nowhere = [(row["input_ids"], [False] * len(row["input_ids"])) for row in rows]
    tensors = _stack(learnt_nowhere, spec.seq_len, tokenizer)
    if "token_type_ids" in rows[0]:
        kinds = [(row["token_type_ids"], [False] * len(row["token_type_ids"])) for row in rows]
        typed = _stack(kinds, spec.seq_len, tokenizer)
        tensors["token_type_ids"] = typed["input_ids"] * typed["attention_mask"]
    tensors["labels"] = torch.tensor(labels)
    return TokenSamples(tensors, counts, to_longest=spec.padding == "longest")


def encoder(
    example: Pair | Chat, tokenizer: "PreTrainedTokenizerBase", spec: DataSpec
) -> Callable[[Pair | Chat], Encoded]:
    """Return what turns examples like `example` into tokens."""
    begin, end = begin_of_text(tokenizer), end_of_text(tokenizer)
    if isinstance(example, Chat):
        template = chat.template_of(tokenizer, spec.template)
        # The tokenizer's own template puts the token itself where one is due.
        ahead = [] if spec.template is None else begin

        def conversation(item: Pair | Chat) -> Encoded:
            tokens, learnt = chat.encode(cast("Chat", item), tokenizer, template)
            return ahead + tokens, [False] * len(ahead) + learnt

        return conversation

    def pair(item: Pair | Chat) -> Encoded:
        one = cast("Pair", item)
        prompt, target = (
            tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            for text in (f"{one.prompt}\n", one.target)
        )
        n_prompt = len(begin) + len(prompt)
        tokens = begin + prompt + target + end
        all_of_it = spec.loss_on == "all"
        return tokens, [all_of_it or place >= n_prompt for place in range(len(tokens))]

    return pair


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", spec: DataSpec, prompt: str) -> list[int]:
    """Return the tokens that a model trained on `spec` is to go on from, as training had them.

    Of conversations `prompt` is what the user says; of pairs it is the prompt; else the beginning
    of a text.

    Raises
    ------
    FedsplitError
        If the chat template refuses it, or it makes no token.
    """
    begin = begin_of_text(tokenizer)
    if spec.source == "chat":
        template = chat.template_of(tokenizer, spec.template)
        asked = chat.question(prompt, tokenizer, template)
        return asked if spec.template is None else begin + asked
    pairs = spec.source == "e2e" or spec.prompt_column is not None
    text = f"{prompt}\n" if pairs else prompt
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    require(len(begin + tokens) > 0, "prompt", prompt, "text of a token at least")
    return begin + cast("list[int]", tokens)


def sizer(
    example: Example, tokenizer: "PreTrainedTokenizerBase | None", spec: DataSpec
) -> Callable[[Example], int]:
    """Return what tells how many tokens of a sample's `spec.seq_len` an example fills.

    Whatever makes a sample by itself fills all of them; what is left out, none.
    """
    if tokenizer is None or isinstance(example, Picture | Labelled):
        return lambda item: spec.seq_len
    if isinstance(example, Text):
        known = tokenizer

        def tokens_of(item: Example) -> int:
            text = cast("Text", item).text
            return len(known(text, add_special_tokens=False, verbose=False).input_ids)

        return tokens_of
    encode = encoder(example, tokenizer, spec)

    def all_or_nothing(item: Example) -> int:
        first = _first_target(encode(cast("Pair | Chat", item))[1])
        return spec.seq_len if first is not None and first < spec.seq_len else 0

    return all_or_nothing


def _first_target(learnt: Sequence[bool]) -> int | None:
    """Return the first token that is learnt; what is learnt is the one after: never the first."""
    return next((place for place, own in enumerate(learnt) if own and place > 0), None)


def _counts(read: int, lengths: Sequence[int], cut: int) -> Counts:
    """Return what became of `read` examples, each of which is a sample or was dropped."""
    return Counts(
        read=read,
        samples=len(lengths),
        cut=cut,
        dropped=read - len(lengths),
        tokens=sum(lengths),
        longest=max(lengths),
    )


def _stack(
    rows: Iterable[Encoded], seq_len: int, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, torch.Tensor]:
    rows = list(rows)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), seq_len), cast("int", filler))
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, (tokens, learnt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        own = torch.tensor(learnt)
        labels[i, : len(tokens)][own] = ids[i, : len(tokens)][own]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def begin_of_text(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the begin-of-text token for tokenizers that put one (Llama, Gemma)."""
    bos = tokenizer.bos_token_id
    return [cast("int", bos)] if bos is not None and bos in tokenizer("").input_ids else []


def end_of_text(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the end-of-text token, if there is one."""
    return [] if tokenizer.eos_token_id is None else [cast("int", tokenizer.eos_token_id)]


def first_sample(samples: TokenSamples, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text of the first sample without padding, what is learnt between [[ and ]]."""
    tensors = {name: tensor[0] for name, tensor in samples.tensors.items()}
    labels = tensors["labels"]
    kept = tensors.get("attention_mask", torch.ones_like(labels)).bool()
    learnt = (labels != IGNORED)[kept].tolist()
    return chat.marked(tensors["input_ids"][kept].tolist(), learnt, tokenizer)
