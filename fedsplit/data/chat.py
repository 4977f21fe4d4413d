"""Conversations: how rows hold them, how they become text, and which tokens of it are learnt."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from fedsplit.data.examples import Chat, Message
from fedsplit.data.spec import DataSpec
from fedsplit.errors import FedsplitError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
TextOf = Callable[[Row, str, str], str]

ASSISTANT = "assistant"

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
}
"""Chat templates by name, for tokenizers that have none."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOT_OBEYED = ("tool_calls", "tool_call_id", "weight")


def messages_of(row: Row, spec: DataSpec, where: str, text_of: TextOf) -> tuple[Message, ...]:
    """Return the conversation in a row.

    It is the list of messages in `spec.messages_column`; else the prompt and the answer in the
    columns that `spec` names, in ``prompt`` and ``completion``, or in ``instruction``, ``input``
    (which may be empty) and ``output``.

    Parameters
    ----------
    row : mapping
        Values by column.
    spec : DataSpec
        Its ``*_column`` fields.
    where : str
        File and row, for errors.
    text_of : callable
        Returns the text in a column of a row, or refuses what is none.

    Raises
    ------
    FedsplitError
        If the row has no conversation, or what a message holds cannot be learnt as it is meant.
    """
    named = (spec.prompt_column, spec.target_column)
    if row.get(spec.messages_column) is not None:
        return _listed(row[spec.messages_column], where)
    if named[0] is not None and named[1] is not None:
        return _answered(row, named[0], named[1], where, text_of)
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _answered(row, "prompt", "completion", where, text_of)
    if row.get("instruction") is not None and row.get("output") is not None:
        asked = text_of(row, "instruction", where)
        if row.get("input") not in (None, ""):
            asked = f"{asked}\n\n{text_of(row, 'input', where)}"
        return Message("user", asked), Message(ASSISTANT, text_of(row, "output", where))
    raise FedsplitError(
        f"{where}: no conversation; columns are {', '.join(map(str, row))}, must hold "
        f"{spec.messages_column!r}, or 'prompt' and 'completion', or 'instruction' and 'output'; "
        "or name them by data.messages_column, or data.prompt_column and data.target_column"
    )


def _answered(
    row: Row, prompt: str, target: str, where: str, text_of: TextOf
) -> tuple[Message, ...]:
    values = row.get(prompt), row.get(target)
    if all(isinstance(value, list) for value in values):
        return _listed(values[0], where) + _listed(values[1], where)
    asked, answer = text_of(row, prompt, where), text_of(row, target, where)
    return Message("user", asked), Message(ASSISTANT, answer)


def _listed(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise FedsplitError(f"{where}: must be a list of messages, each with 'role' and 'content'")
    messages = []
    for number, item in enumerate(value, start=1):
        at = f"{where}, message {number}"
        if not isinstance(item, Mapping):
            raise FedsplitError(f"{at}: must be an object with 'role' and 'content'")
        for name in ("role", "content"):
            if not isinstance(item.get(name), str):
                keys = ", ".join(map(str, item))
                raise FedsplitError(f"{at}: {name!r} must be text; its keys are {keys}")
        for name in _NOT_OBEYED:
            if item.get(name) not in (None, []):
                raise FedsplitError(f"{at}: {name!r} is not obeyed, take it away")
        messages.append(Message(item["role"], item["content"]))
    return tuple(messages)


def template_of(tokenizer: "PreTrainedTokenizerBase", name: str | None) -> str:
    """Return the template that `name` stands for; the tokenizer's own where it is None.

    Raises
    ------
    FedsplitError
        If there is no such template.
    """
    known = ", ".join(TEMPLATES)
    if name is not None:
        require(name in TEMPLATES, "data.template", name, f"null (the tokenizer's) or {known}")
        return TEMPLATES[name]
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise FedsplitError(
            f"data.template=None: must be {known}, for this model's tokenizer has no chat template"
        ) from error


def encode(
    chat: Chat, tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation and which of them are learnt.

    Learnt is what the assistant says, up to and with the mark that ends its turn: what the template
    puts between ``{% generation %}`` and ``{% endgeneration %}``; or, in a template without these,
    the text by which a message of the assistant makes it longer than the prompt for it.

    Parameters
    ----------
    chat : Chat
        The conversation.
    tokenizer : PreTrainedTokenizerBase
        A fast one, which knows the place of each token in the text.
    template : str
        A Jinja template, see `template_of`.

    Raises
    ------
    FedsplitError
        If the template refuses the conversation, or if the assistant's part of it cannot be told:
        a later message changes what is before it, or a token is only partly the assistant's.
    """
    where = f"{chat.file}, row {chat.row}"
    messages = [{"role": item.role, "content": item.content} for item in chat.messages]
    try:
        if _GENERATION.search(template):
            made = cast(
                "Mapping[str, Any]",
                tokenizer.apply_chat_template(
                    messages,
                    chat_template=template,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                ),
            )
            return list(made["input_ids"]), [bool(own) for own in made["assistant_masks"]]
        return _by_prefixes(messages, tokenizer, template, where)
    except FedsplitError:
        raise
    except Exception as error:  # whatever a template raises
        raise FedsplitError(f"{where}: the chat template refuses it: {error}") from error


def question(text: str, tokenizer: "PreTrainedTokenizerBase", template: str) -> list[int]:
    """Return the tokens of a conversation in which a user has said `text`, up to the answer.

    Raises
    ------
    FedsplitError
        If the template refuses it.
    """
    try:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # whatever a template raises
        raise FedsplitError(f"prompt: the chat template refuses it: {error}") from error
    made = tokenizer(str(asked), add_special_tokens=False, verbose=False)
    return cast("list[int]", made["input_ids"])


def _by_prefixes(
    messages: Sequence[dict[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    where: str,
) -> tuple[list[int], list[bool]]:
    def render(some: Sequence[dict[str, str]], *, ask: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            list(some), chat_template=template, tokenize=False, add_generation_prompt=ask
        )
        return str(text)

    whole = render(messages)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            answered = render(messages[: place + 1])
            if place:
                asked = render(messages[:place], ask=True)
            else:  # no template is asked for an empty conversation
                prompt = render(messages[:1], ask=True).removeprefix(answered)
                asked = "".join(answered.partition(prompt)[:2]) if prompt else answered
            if not (answered.startswith(asked) and whole.startswith(answered)):
                raise FedsplitError(
                    f"{where}: where the assistant's message {place + 1} begins or ends cannot be "
                    "told from the tokenizer's chat template; choose another, such as "
                    "data.template=chatml"
                )
            spans.append((len(asked), _end_of(answered, len(asked), message["content"])))
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = cast("list[int]", made["input_ids"])
    places = cast("list[tuple[int, int]]", made["offset_mapping"])
    return tokens, [_is_inside(place, spans, where) for place in places]


def _end_of(answered: str, start: int, content: str) -> int:
    """Return where the assistant's turn ends: white space after the mark of its end is not it."""
    if answered[start:].strip() == content.strip():
        return len(answered)  # the white space is the mark
    return max(start, len(answered.rstrip()))


def _is_inside(place: tuple[int, int], spans: Sequence[tuple[int, int]], where: str) -> bool:
    first, last = place
    for start, end in spans:
        if start <= first and last <= end:
            return True
        if first < end and last > start:
            raise FedsplitError(
                f"{where}: a token is partly the assistant's and partly the chat template's, such "
                "as a line end; take white space off the beginning and end of its messages"
            )
    return False


def marked(
    tokens: Sequence[int], learnt: Sequence[bool], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """Return the text of `tokens`, with ``[[`` and ``]]`` around what is learnt."""
    runs: list[tuple[bool, list[int]]] = []
    for token, own in zip(tokens, learnt, strict=True):
        if not runs or runs[-1][0] != own:
            runs.append((own, []))
        runs[-1][1].append(token)
    texts = ((own, str(tokenizer.decode(run))) for own, run in runs)
    return "".join(f"[[{text}]]" if own else text for own, text in texts)
