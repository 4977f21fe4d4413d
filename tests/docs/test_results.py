"""Figures of the real benchmark: the page says what the JSON beside it does, and floors hold."""

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods, schemes
from benchmarks._real_page import marks, members, read_results, tables, write_page
from benchmarks._real_tasks import TASKS, Item, judge
from benchmarks.real import floors, summary

from .pages import ROOT

PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "docs" / "results"
SHOWN = {"methods": methods.table, "schemes": schemes.table}
FILES = [*sorted(RESULTS.glob("real*.json")), *(RESULTS / f"{name}.json" for name in SHOWN)]


def test_every_figure_of_the_page_is_in_the_json_beside_it() -> None:
    text = PAGE.read_text()
    for file in FILES:
        begin, end = marks(file.stem)
        assert text.count(begin) == 1, file
        shown = SHOWN.get(file.stem, tables)
        block = text.partition(begin)[2].partition(end)[0]
        assert block.strip() == shown(read_results(file)).strip()
    assert text.count("<!-- figures: ") == len(FILES)


def test_the_readmes_table_is_of_the_same_json() -> None:
    task = read_results(ROOT / "docs" / "results" / "real.json")["tasks"]["e2e"]
    named = members(task)
    text = (ROOT / "README.md").read_text().partition("| trained by |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()[2:]]
    split = ("splitfed, cut 1", "splitfed, cut 15")
    told = ("untrained", "central", "fedlora", *split, "bf16", "topk")
    for row, name in zip(rows, told, strict=True):
        member = named[name]
        assert row[:2] == [f"{member['loss']:.4f}", f"{member['bleu']:.1f}"]
        if "device_peak_bytes" in member:
            sent, held = member["device_link_bytes"] / 1e6, member["device_peak_bytes"] / 1e6
            assert row[2:] == [f"{sent:.1f}", f"{held:.0f}"]


def run(loss: float, bleu: float, *turns: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "bleu": bleu,
        "wall_s": 1.0,
        "turns": {f"1/{device}": value for device, value in enumerate(turns)},
        "device_link_bytes": 12_340_000,
    }


def found(seeds: int = 1) -> dict[str, list[dict[str, Any]]]:
    whole = run(1.5, 30.0, 2.5, 2.6)
    each = {
        "untrained": {"loss": 2.7, "bleu": 5.0, "wall_s": 1.0},
        "central": {"loss": 1.45, "bleu": 31.0, "wall_s": 1.0},
        "fedlora": whole,
        "splitfed_15": copy.deepcopy(whole),
        "sft": run(1.6, 28.0, 2.51, 2.62),
    }
    return {name: [copy.deepcopy(one) for _ in range(seeds)] for name, one in each.items()}


@pytest.mark.parametrize(
    ("member", "key", "value", "missed"),
    [
        ("sft", "loss", 1.45 * 1.15 - 1e-9, None),
        ("sft", "loss", 1.45 * 1.15 + 1e-3, "sft: loss 1.6685, central's exceeded"),
        ("sft", "bleu", 10.0, None),
        ("sft", "bleu", 9.9, "sft: bleu +4.9 points only"),
        ("central", "loss", 2.5, "central: loss 2.5000, hardly learnt"),
        ("splitfed_15", "turns", {"1/0": 2.5, "1/1": 2.6 + 9e-6}, None),
        ("splitfed_15", "turns", {"1/0": 2.5, "1/1": 2.60002}, "splitfed_15: a turn's loss is"),
        ("splitfed_15", "turns", {"1/0": 2.5}, "splitfed_15: its turns are not FedLoRA's"),
        ("sft", "turns", {"1/0": 9.0, "1/1": 9.0}, None),  # compressed: another loss is its price
    ],
)
def test_floors(member: str, key: str, value: object, missed: str | None) -> None:
    judged = found()
    judged[member][0][key] = value
    lines = floors(TASKS["e2e"], judged)
    assert len(lines) == (missed is not None), lines
    assert all((missed or "") in line for line in lines)


def test_of_several_seeds_means_count_and_every_turn() -> None:
    judged = found(seeds=3)
    judged["untrained"] = judged["untrained"][:1]
    judged["sft"][2]["loss"] = 1.45 * 1.15 * 3 - 2 * 1.6 - 1e-6  # alone too much, not on average
    assert floors(TASKS["e2e"], judged) == []
    judged["splitfed_15"][1]["turns"]["1/1"] += 1e-3
    (line,) = floors(TASKS["e2e"], judged)
    assert line.startswith("e2e splitfed_15: a turn's loss is 0.001 from FedLoRA's (1)")
    size = {"rounds": 2, "steps": 6, "n_test": 48, "n_written": 32}
    settings = {"devices": 2, "batch": 8, "r": 8, "lr": 0.002, "seeds": [0, 1, 2]}
    text = tables(
        {"settings": settings, "tasks": {"e2e": {"size": size, **summary(judged)}}, "missed": []}
    )
    assert "3 seeds (mean, least and most)" in text
    assert "| sft | 1.6675 (1.6000 to 1.8025) | 28.0 (28.0 to 28.0) |" in text


def test_the_page_is_made_of_the_json_alone(tmp_path: Path) -> None:
    size = {"rounds": 2, "steps": 6, "n_test": 48, "n_written": 32}
    settings = {"devices": 2, "batch": 8, "r": 8, "lr": 0.002, "seeds": [0]}
    tasks = {"e2e": {"size": size, **summary(found())}}
    results = {"settings": settings, "tasks": tasks, "missed": []}
    page = tmp_path / "results.md"
    page.write_text("# Title\n\nWords.\n")
    for _ in range(2):  # the second time in place of the first
        write_page(results, tmp_path, "real_quick")
        text = page.read_text()
        assert text.startswith("# Title\n\nWords.\n")
        assert text.count("| splitfed, cut 15 | 1.5000 | 30.0 | 12.3 |") == 1
    assert read_results(tmp_path / "results" / "real_quick.json") == results
    assert tables(results) in text


def test_the_table_of_methods_is_of_all_seeds() -> None:
    row: dict[str, float] = dict.fromkeys(methods.COLUMNS, 2e6) | {"untrained_loss": 4.0}
    settings = {"model": "a model", "cut": 3, "devices": 2, "epochs": 3, "examples": 9, "seeds": 2}
    rows = [row | {"loss": 3.0, "up_bytes": 1e6}, row | {"loss": 3.5, "up_bytes": 3e6}]
    others = [rows[0] | {"loss": 3.5}, rows[1] | {"loss": 3.75}]
    text = methods.table({"settings": settings, "members": {"plain": rows, "other": others}})
    assert "| plain | 3.2500 (3.0000 to 3.5000) | 0.0000 | 2.00 (1.00 to 3.00) | 2.00 |" in text
    assert "| other | 3.6250 (3.5000 to 3.7500) | 0.3750 (0.2500 to 0.5000) |" in text
    assert "2 seeds" in text
    assert "Untrained, the loss is 4.0000" in text


def test_answers_are_judged_as_their_tasks_say() -> None:
    items = [
        Item(prompt="2 + 2?", answers=("2 + 2 = 4\n#### 4",)),
        Item(prompt="?", answers=("#### 1,200",)),
    ]
    score = TASKS["gsm8k"].score
    assert score(items, ["It is 4.", "so 1200"]) == {"exact": 100.0}
    assert score(items, ["4 and 5", "#### 1200 or 7"]) == {"exact": 50.0}
    labels = [Item(prompt="a", answers=("positive",)), Item(prompt="b", answers=("negative",))]
    assert TASKS["sst2"].score(labels, ["positive", "positive"]) == {"accuracy": 50.0}


def test_a_loss_is_of_the_answer_alone(tiny_checkpoint: Path) -> None:
    """As plain transformers computes it, one item at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    items = [
        Item(prompt="the quick", answers=("negative",)),
        Item(prompt="fox and cat", answers=("positive",)),
    ]
    loss, count = 0.0, 0
    for item in items:
        ask = tokenizer(f"{item.prompt}\n", add_special_tokens=False).input_ids
        told = [
            *tokenizer(item.answers[0], add_special_tokens=False).input_ids,
            tokenizer.eos_token_id,
        ]
        labels = torch.tensor([[-100] * len(ask) + told])
        with torch.no_grad():
            each = model(input_ids=torch.tensor([ask + told]), labels=labels).loss.item()
        loss, count = loss + each * len(told), count + len(told)
    assert judge(TASKS["sst2"], model, tokenizer, items, 0)["loss"] == pytest.approx(loss / count)
