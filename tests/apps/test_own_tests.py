"""What a run leaves behind when it is asked for: one process, the real server and devices."""

import json
from pathlib import Path

import pytest
import torch
from fedsplit.apps.check import check, require_own_tests
from fedsplit.apps.config import data_spec, job, load_config
from fedsplit.apps.server_app import run_job
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.data import batches, load_test
from fedsplit.errors import FedsplitError
from fedsplit.flower import client_app
from fedsplit.report import read_records, read_stopped, read_turns
from fedsplit.testing.grid import ThreadGrid

DEVICES = 2


@pytest.fixture(scope="module")
def own_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a test set that no device holds."""
    file = tmp_path_factory.mktemp("central") / "test.txt"
    file.write_text("\n\n".join(f"white line {n}: {n * n} white things." for n in range(30)))
    return file


@pytest.fixture(scope="module")
def overrides(tiny_checkpoint: Path, tiny_text: Path, own_test: Path) -> list[str]:
    return [
        f"model={tiny_checkpoint}", "model.r=2", "data=text", f"data.path={tiny_text}",
        "data.seq_len=16", "data.min_samples=4", "data.partition=iid",
        f"fleet.devices={DEVICES}", "train.batch_size=2", "train.steps=1", "strategy.cut=1",
        "run.accelerator=cpu", "train.optimizer.lr=3e-3", f"evaluate.central={own_test}",
        "evaluate.max_samples=3", "evaluate.metrics=[token_accuracy]", "keep.every=2",
        "evaluate.prompts=[red line]", "evaluate.max_new_tokens=5", "evaluate.prompts_every=2",
        "keep.best=true",
    ]  # fmt: skip


def carry_out(overrides: list[str], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    run_job(ThreadGrid(client_app(), DEVICES), load_config(overrides), folder)
    return folder


@pytest.fixture(scope="module")
def whole(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of three rounds."""
    return carry_out([*overrides, "rounds=3"], tmp_path_factory.mktemp("whole"))


def test_what_the_server_measures_changes_nothing_that_is_trained(
    whole: Path, overrides: list[str], tmp_path: Path
) -> None:
    asked = ("evaluate.", "keep.")
    plain = [word for word in overrides if not word.startswith(asked)]
    other = carry_out([*plain, "rounds=3"], tmp_path)
    first, second = (load_file(at / "adapter/adapter_model.safetensors") for at in (whole, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (other / "kept").exists()
    assert {"token_accuracy", "central", "written"}.isdisjoint(
        json.loads((other / "results.json").read_text())["rounds"][-1]
    )


def test_a_device_evaluates_on_no_more_samples_than_asked(whole: Path) -> None:
    turns = [turn for turn in read_turns(whole) if turn.phase == "evaluate"]
    assert [turn.samples for turn in turns] == [3] * DEVICES * 4
    assert len({(turn.device, turn.targets) for turn in turns}) == DEVICES, "the same every round"


def test_the_server_s_own_loss_is_what_plain_peft_finds(
    whole: Path, overrides: list[str], tiny_checkpoint: Path
) -> None:
    """On the same three samples of its test set, with the adapter that the run leaves."""
    from fedsplit.data import draw
    from fedsplit.seeds import generator

    config = load_config(overrides)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    held = load_test(data_spec(config), tokenizer, config.evaluate.central)
    some = draw(held, 3, generator(config.seed, "evaluate", "central"))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model = PeftModel.from_pretrained(model, whole / "adapter").eval()
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches(some, 1):
            output = model(**batch.inputs)
            targets = batch.inputs["labels"][:, 1:]
            loss += output.loss.item() * targets.numel()
            right += int((output.logits[:, :-1].argmax(-1) == targets).sum())
            count += targets.numel()
    record = read_records(whole)[-1]
    assert record.central is not None
    assert record.central["loss"] == pytest.approx(loss / count, abs=1e-5)
    assert record.central["token_accuracy"] == pytest.approx(right / count)
    assert record.perplexity is None, "it was not asked for"
    assert record.token_accuracy is not None


def test_texts_stand_in_the_rounds_that_are_due(whole: Path) -> None:
    written = {record.round: record.written for record in read_records(whole)}
    assert [round_ for round_, texts in written.items() if texts] == [0, 2]
    assert written[2][0].prompt == "red line"
    assert written[2][0].text


def test_adapters_are_kept_of_rounds_and_of_the_best(whole: Path) -> None:
    losses = {record.round: record.eval_loss for record in read_records(whole) if record.round}
    best = min(losses, key=lambda number: losses[number] or 0.0)
    assert {path.name for path in (whole / "kept").iterdir()} == {"round_2", f"best_{best}"}
    last, second = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (whole / "adapter", whole / "kept" / "round_2")
    )
    assert last.keys() == second.keys()
    assert any(not torch.equal(last[name], second[name]) for name in last)


def test_a_run_that_was_cut_short_keeps_and_ends_as_one_that_was_not(
    overrides: list[str], tmp_path: Path
) -> None:
    """No loss is ever better by 9 nats: it ends after round 1 and two more."""
    rule = ["stop.patience=2", "stop.min_delta=9"]
    whole = carry_out([*overrides, *rule, "rounds=6"], tmp_path / "whole")
    assert [record.round for record in read_records(whole)] == [0, 1, 2, 3]
    reason = "eval_loss has not fallen since round 1, for stop.patience=2 rounds"
    assert read_stopped(whole) == reason

    parts = carry_out([*overrides, *rule, "rounds=2"], tmp_path / "parts")
    assert read_stopped(parts) is None
    carry_out([f"resume={parts}", "rounds=6"], parts)
    assert read_stopped(parts) == reason
    names = ("round", "train_loss", "eval_loss", "token_accuracy", "central", "written")
    first, second = (
        [[getattr(record, name) for name in names] for record in read_records(at)]
        for at in (whole, parts)
    )
    assert first == second
    names = [sorted(path.name for path in (at / "kept").iterdir()) for at in (whole, parts)]
    assert names[0] == names[1]
    with pytest.raises(FedsplitError, match=f"stop.patience=2: must be larger to go on: {reason}"):
        check(load_config([f"resume={parts}"]), parts)
    check(load_config([f"resume={parts}", "stop.patience=5"]), parts)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["evaluate.central=none.txt"], "evaluate.central='.*none.txt'"),
        (["evaluate.central={folder}"], "evaluate.central=|has no examples"),
    ],
)
def test_a_test_set_that_cannot_be_read_is_refused(
    overrides: list[str], tmp_path: Path, given: list[str], complaint: str
) -> None:
    config = load_config([*overrides, *[word.format(folder=tmp_path) for word in given]])
    with pytest.raises(FedsplitError, match=complaint):
        require_own_tests(config, job(config), data_spec(config))
