"""What of a sample is learnt is shown before anything starts, where it is not all of it."""

import json
from pathlib import Path

from fedsplit.apps.check import check
from fedsplit.apps.config import load_config

SMALL = ("fleet.devices=2", "data.seq_len=64", "train.batch_size=2")


def test_the_answers_of_a_conversation_are_marked(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    talks = (
        [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n}"}]
        for n in range(40)
    )
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    words = ("data=chat", f"data.path={file}", "data.template=chatml", *SMALL)
    shown = check(load_config(words), tmp_path / "out")
    assert shown is not None
    asked, answered = shown.partition("[[")[::2]
    assert "ask " in asked
    assert answered.startswith("say ")
    assert "]]" in answered


def test_where_all_is_learnt_nothing_is_marked(tmp_path: Path) -> None:
    assert check(load_config(SMALL), tmp_path / "out") is None
