"""Chat data: which tokens of a conversation are learnt, checked against two other ways to tell."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedsplit.assets import default_checkpoint
from fedsplit.data import DataSpec, first_sample, load_data
from fedsplit.data.chat import TEMPLATES, encode, template_of
from fedsplit.data.examples import Chat, Message
from fedsplit.data.samples import IGNORED
from fedsplit.data.sources import read_corpus
from fedsplit.data.tokens import pad
from fedsplit.errors import FedsplitError

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"

CHATML = TEMPLATES["chatml"]
END = "<|im_end|>"
# The same text, with the learnt part between marks: as model makers write their templates now.
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
CONVERSATION = [
    ("system", "Answer in few words."),
    ("user", "Who are you?"),
    ("assistant", "A list of items."),
    ("user", "And who is Zoë 😀?"),
    ("assistant", "She returns None\n\nif x < 2. "),
]


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(default_checkpoint())


def _chat(*messages: tuple[str, str]) -> Chat:
    return Chat(tuple(Message(*message) for message in messages), 0, file="a.jsonl", row=7)


def _learnt_texts(tokens, learnt, tokenizer) -> list[str]:
    """Return the text of each unbroken run of learnt tokens."""
    runs: list[list[int]] = [[]]
    for token, own in zip(tokens, learnt, strict=True):
        if own:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def _by_token_prefixes(chat: Chat, tokenizer, template: str) -> tuple[list[int], list[bool]]:
    """Tell what is learnt as TRL does, by lengths of tokenized prefixes; less the last line end."""
    messages = [{"role": item.role, "content": item.content} for item in chat.messages]

    def tokens(n: int, ask: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(
            messages[:n], chat_template=template, add_generation_prompt=ask, return_dict=False
        )

    whole = tokens(len(messages))
    learnt = [False] * len(whole)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            opening = tokenizer("<|im_start|>assistant\n").input_ids
            start = len(tokens(place, ask=True)) if place else len(opening)
            stop = len(tokens(place + 1))
            assert whole[:stop] == tokens(place + 1)
            assert tokenizer.decode(whole[stop - 1]) == "\n"
            learnt[start : stop - 1] = [True] * (stop - 1 - start)
    return whole, learnt


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by marks"])
@pytest.mark.parametrize("bytewise", [False, True])
def test_learnt_is_what_the_assistant_says_and_the_end_of_its_turn(
    shipped, tokenizer, template, bytewise
):
    used = tokenizer if bytewise else shipped
    tokens, learnt = encode(_chat(*CONVERSATION), used, template)
    said = [content + END for role, content in CONVERSATION if role == "assistant"]
    assert _learnt_texts(tokens, learnt, used) == said
    whole = "".join(f"<|im_start|>{role}\n{content}{END}\n" for role, content in CONVERSATION)
    assert used.decode(tokens) == whole


WORDS = st.text(st.sampled_from("ab .,:<|>é\n1"), max_size=12).map(lambda text: f"x{text}x")


@settings(max_examples=60, deadline=None)
@given(
    system=st.booleans(),
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), WORDS), min_size=1),
)
def test_three_ways_to_tell_what_is_learnt_agree(shipped, system, turns):
    chat = _chat(*[("system", "Be kind.")] * system, *turns)
    found = encode(chat, shipped, CHATML)
    assert found == _by_token_prefixes(chat, shipped, CHATML)
    if any(role == "assistant" for role, _ in turns):
        assert found == encode(chat, shipped, MARKED)


def test_an_empty_answer_is_learnt_as_the_end_of_a_turn_alone(shipped):
    for template in (CHATML, MARKED):
        tokens, learnt = encode(_chat(("user", "a"), ("assistant", "")), shipped, template)
        assert _learnt_texts(tokens, learnt, shipped) == [END]


def test_a_template_that_ends_turns_by_a_line_end_has_it_learnt(shipped):
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokens, learnt = encode(_chat(("user", "a"), ("assistant", "b c")), shipped, template)
    assert _learnt_texts(tokens, learnt, shipped) == [" b c\n"]


def test_a_conversation_is_cut_at_seq_len_and_left_out_if_nothing_is_learnt_then(tokenizer):
    spec = DataSpec(source="chat", path="x", template="chatml", seq_len=62)
    short = _chat(("user", "a"), ("assistant", "bcd" * 20))  # the answer begins at token 51
    long = _chat(("user", "a" * 30), ("assistant", "b"))
    without = _chat(("user", "a"))
    fits = _chat(("user", ""), ("assistant", "b"))
    samples = pad([short, long, without, fits], tokenizer, spec)
    assert samples.counts.read == 4
    assert (samples.counts.samples, samples.counts.cut, samples.counts.dropped) == (2, 1, 2)
    tokens, learnt = encode(short, tokenizer, CHATML)
    first = {name: tensor[0].tolist() for name, tensor in samples.tensors.items()}
    assert first["input_ids"] == tokens[:62]
    assert (
        first["labels"]
        == [token if own else IGNORED for token, own in zip(tokens, learnt, strict=True)][:62]
    )
    second = {name: tensor[1] for name, tensor in samples.tensors.items()}
    kept = second["attention_mask"].bool()
    assert (second["labels"][~kept] == IGNORED).all()
    assert tokenizer.decode(second["labels"][second["labels"] != IGNORED]) == f"b{END}"


def test_the_tokenizers_own_template_is_taken_unless_another_is_named(shipped, tokenizer):
    with pytest.raises(FedsplitError, match=r"data\.template=None: must be chatml, for this model"):
        template_of(shipped, None)
    with pytest.raises(FedsplitError, match=r"data\.template='llama': must be null .* or chatml"):
        template_of(shipped, "llama")
    own = AutoTokenizer.from_pretrained(default_checkpoint())
    own.chat_template = MARKED
    assert template_of(own, None) == MARKED
    assert template_of(own, "chatml") == CHATML


def test_a_named_template_begins_as_the_tokenizer_begins_a_text(beginning_tokenizer):
    spec = DataSpec(source="chat", path="x", template="chatml", seq_len=99)
    samples = pad([_chat(("user", "a"), ("assistant", "b"))], beginning_tokenizer, spec)
    assert first_sample(samples, beginning_tokenizer) == (
        f"<|begin|><|im_start|>user\na{END}\n<|im_start|>assistant\n[[b{END}]]\n"
    )


FORGETFUL = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STRICT = "{{ raise_exception('roles must alternate') }}"
UNPROMPTED = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '[model]' }}{% endif %}"  # noqa: E501


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (FORGETFUL, "where the assistant's message 2 begins or ends cannot be told"),
        (UNPROMPTED, "where the assistant's message 2 begins or ends cannot be told"),
        (STRICT, "the chat template refuses it: roles must alternate"),
        ("{{ messages[0].nothing.at.all }}", "the chat template refuses it: "),
    ],
)
def test_where_the_assistants_part_cannot_be_told_the_row_is_refused(shipped, template, says):
    chat = _chat(("user", "a"), ("assistant", "b</think>c"), ("user", "d"), ("assistant", "e"))
    with pytest.raises(FedsplitError) as caught:
        encode(chat, shipped, template)
    assert str(caught.value).startswith(f"a.jsonl, row 7: {says}")


def test_a_token_that_is_half_the_templates_is_refused(shipped):
    template = (
        "{% for m in messages %}{{ '\nretur' if m['role'] == 'assistant' else '\n' }}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\nretur' }}{% endif %}"
    )
    assert len(shipped("return").input_ids) == 1
    with pytest.raises(FedsplitError, match=r"a\.jsonl, row 7: a token is partly the assistant's"):
        encode(_chat(("user", "a"), ("assistant", "n x")), shipped, template)
    tokens, learnt = encode(_chat(("user", "a"), ("assistant", ". x")), shipped, template)
    assert _learnt_texts(tokens, learnt, shipped) == [". x"]


ASKED = (Message("user", "1+1?"), Message("assistant", "2"))


@pytest.mark.parametrize(
    ("row", "fields", "messages"),
    [
        ({"messages": [{"role": "user", "content": "1+1?"},
                       {"role": "assistant", "content": "2"}]}, {}, ASKED),
        ({"talk": [{"role": "user", "content": "1+1?", "name": None},
                   {"role": "assistant", "content": "2"}]}, {"messages_column": "talk"}, ASKED),
        ({"prompt": "1+1?", "completion": "2"}, {}, ASKED),
        ({"prompt": [{"role": "user", "content": "1+1?"}],
          "completion": [{"role": "assistant", "content": "2"}]}, {}, ASKED),
        ({"instruction": "1+1?", "input": "", "output": "2"}, {}, ASKED),
        ({"instruction": "1+1?", "output": "2"}, {}, ASKED),
        ({"instruction": "Add.", "input": "1, 1", "output": "2"}, {},
            (Message("user", "Add.\n\n1, 1"), ASKED[1])),
        ({"q": "1+1?", "a": 2}, {"prompt_column": "q", "target_column": "a"}, ASKED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_row_holds_a_conversation_in_any_of_these_ways(tmp_path, row, fields, messages, suffix):
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list([row, row]).to_parquet(str(file))
    elif suffix == ".json":
        file.write_text(json.dumps([row, row]))
    else:
        file.write_text(f"{json.dumps(row)}\n" * 2)
    corpus = read_corpus(DataSpec(source="chat", path=str(file), **fields))
    assert corpus.train == [Chat(messages, 0)] * 2


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not in {GSM8K}")
def test_real_questions_are_read_as_conversations(shipped):
    spec = DataSpec(
        source="chat", path=str(GSM8K), prompt_column="question", target_column="answer",
        template="chatml", seq_len=512, max_samples=60,
    )  # fmt: skip
    data = load_data(spec, shipped, 2, 0)
    counts = data.counts()
    assert sum(item.train.read + item.test.read for item in counts.values()) == 60
    text = first_sample(data.train(0), shipped)
    assert text.startswith("<|im_start|>user\n")
    assert text.count("[[") == text.count("]]") >= 1
    assert text.endswith(f"{END}]]\n")
