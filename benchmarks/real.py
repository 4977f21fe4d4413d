"""A real model on real tasks: quality against traffic and memory, for each way to train it.

    python -m benchmarks.real --model FOLDER --data FOLDER [--quick] [--seeds 0 1 2] [--jobs 4]

The model is any causal one with a chat template, such as SmolLM2-135M-Instruct; the data are a
folder with e2e, glue and gsm8k as published.

Tasks (`benchmarks._real_tasks`): E2E (BLEU, ROUGE-L), SST-2 by the likelier of two label words
(accuracy), GSM8K as chat (loss, exact answers). Members: the unsplit model trained by a plain PEFT
loop that sees in each step what all devices see in theirs (`central`), FedLoRA, SplitFed cut after
1, 15 and 29 blocks, in a U shape, and at the middle cut with SFT's codec, with ours of the same
kind that scales each token by itself (`codec=topk`), and with bfloat16 boundaries. All train the
same adapters on the same samples with the same optimizer; all are judged by the same plain
transformers code on the same test items, none of which was trained on.
``--quick`` has one task and, beside the untrained model, four members. A seed draws the adapters'
start and the order of samples; the samples themselves, and the test items, are the same for all.

A member that is done is a JSON file in ``--work`` and is not run again; a run that was cut short
goes on. ``--jobs`` members run at once, but for U shapes, whose memory would not leave enough to
another; ``--accelerator cuda`` on a GPU. Prints a table and, last,
one JSON object. Exit code 1 if a floor is missed:

- a split run without compression has the loss of FedLoRA in every turn of every seed, to 1e-5;
- every member ends within 15 % of the central loss (means over seeds);
- every member improves on the untrained model: its loss by a tenth at least, and E2E's BLEU and
  SST-2's accuracy by 5 points.
"""

import argparse
import gc
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fedsplit.apps.config import data_spec, job, load_config
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._real_page import tables, write_page
from benchmarks._real_tasks import TASKS, Task, draw, judge, write_training_file
from fedsplit.data import load_data, training_batches
from fedsplit.execution.accelerator import torch_device
from fedsplit.report import read_records, read_turns
from fedsplit.report.files import json_text, write_atomically
from fedsplit.seeds import generator

DEVICES, BATCH, RANK, ALPHA, LR = 2, 8, 8, 16, 2e-3
EQUAL, MARGIN, CLEARLY, POINTS = 1e-5, 0.15, 0.9, 5.0
MEMBERS: Mapping[str, Sequence[str]] = {
    "untrained": (),
    "central": (),
    "fedlora": ("strategy=fedlora",),
    "splitfed_1": ("strategy=splitfed", "strategy.cut=1"),
    "splitfed_15": ("strategy=splitfed", "strategy.cut=15"),
    "splitfed_29": ("strategy=splitfed", "strategy.cut=29"),
    "u_shape": ("strategy=splitfed", "strategy.cut=1", "strategy.tail=1"),
    "sft": ("strategy=splitfed", "strategy.cut=15", "codec=sft"),
    "topk": ("strategy=splitfed", "strategy.cut=15", "codec=topk"),
    "bf16": ("strategy=splitfed", "strategy.cut=15", "codec=bf16"),
}
EXACT = ("splitfed_1", "splitfed_15", "splitfed_29", "u_shape")
QUICK = ("untrained", "central", "fedlora", "splitfed_15", "sft")
ALONE = ("u_shape",)  # its server holds a forward pass of each device until the heads answer


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of a task is trained and judged: `steps` of each device in each of `rounds`."""

    rounds: int
    steps: int
    n_test: int
    n_written: int


FULL = {
    "e2e": Size(rounds=4, steps=8, n_test=160, n_written=96),
    "sst2": Size(rounds=4, steps=8, n_test=320, n_written=0),
    "gsm8k": Size(rounds=2, steps=8, n_test=64, n_written=32),
}
SHORT = {"e2e": Size(rounds=2, steps=6, n_test=48, n_written=32)}


@dataclass(frozen=True, kw_only=True)
class Study:
    """One task with one seed: members, each in a file of its own below `folder`."""

    task: str
    size: Size
    model: str
    data: Path
    folder: Path
    accelerator: str
    seed: int

    def prepare(self) -> None:
        """Make the folder, or see that what is in it is of this study."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(self.size), "model": Path(self.model).name, "lr": LR, "batch": BATCH}
        said = self.folder / "study.json"
        if said.exists() and json.loads(said.read_text()) != settings:
            raise SystemExit(f"{self.folder}: holds members of another study; use another --work")
        write_atomically(said, json_text(settings))

    def member(self, name: str) -> dict[str, Any]:
        """Return what came of a member, from its file if it was run before."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            started = time.perf_counter()
            work = _Work(self)
            found = work.plain(name) if name in ("untrained", "central") else work.run(name)
            found["wall_s"] = time.perf_counter() - started
            write_atomically(file, json_text(found))
            gc.collect()
        result: dict[str, Any] = json.loads(file.read_text())
        return result


class _Work:
    """What the members of a study need."""

    def __init__(self, study: Study) -> None:
        self.study, self.task, self.size = study, TASKS[study.task], study.size
        # Each device holds out a tenth, which nobody looks at.
        n_train = DEVICES * self.size.rounds * self.size.steps * BATCH * 10 // 9
        train, self.test = draw(self.task, study.data, n_train, self.size.n_test)
        self.file = write_training_file(self.task, train, study.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(study.model)

    def _overrides(self) -> list[str]:
        columns = "data=chat" if self.task.chat else "data=text"
        return [
            f"model={self.study.model}", "model.dtype=float32", f"model.r={RANK}",
            f"model.alpha={ALPHA}.0", columns, f"data.path={self.file}",
            "data.prompt_column=prompt", "data.target_column=completion", "data.padding=longest",
            f"data.seq_len={self.task.seq_len}", "data.partition=iid", f"fleet.devices={DEVICES}",
            f"rounds={self.size.rounds}", f"train.steps={self.size.steps}",
            f"train.batch_size={BATCH}", f"train.optimizer.lr={LR}", f"seed={self.study.seed}",
            f"evaluate.every={self.size.rounds}", "evaluate.max_samples=1",
            f"run.accelerator={self.study.accelerator}",
        ]  # fmt: skip

    def _judged(self, model: Any) -> dict[str, Any]:
        model.to(torch_device(self.study.accelerator))
        return judge(self.task, model, self.tokenizer, self.test, self.size.n_written)

    def plain(self, name: str) -> dict[str, Any]:
        """Train the unsplit model with PEFT as a script would, or leave it as it is."""
        torch.manual_seed(self.study.seed)
        model = AutoModelForCausalLM.from_pretrained(self.study.model, dtype=torch.float32)
        if name == "untrained":
            return self._judged(model)
        config = load_config(self._overrides())
        optimizer = job(config).optimizer
        samples = load_data(data_spec(config), self.tokenizer, 1, self.study.seed).train(0)
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, task_type=TaskType.CAUSAL_LM)
        place = torch_device(self.study.accelerator)
        trained = get_peft_model(model, lora).to(place).train()
        steps = self.size.rounds * self.size.steps
        order = generator(self.study.seed, "centralised")
        rule = optimizer.build(p for p in trained.parameters() if p.requires_grad)
        for batch in training_batches(samples, DEVICES * BATCH, order, steps):
            rule.zero_grad()
            trained(**{n: v.to(place) for n, v in batch.inputs.items()}).loss.backward()
            rule.step()
        return self._judged(trained)

    def run(self, name: str) -> dict[str, Any]:
        """Train with ``fedsplit run``; judge the adapter that it leaves with plain PEFT."""
        run = self.study.folder / name
        command = ["-m", "fedsplit.apps", "run", *self._overrides(), *MEMBERS[name]]
        subprocess.run([sys.executable, *command, f"output={run}"], check=True)
        base = AutoModelForCausalLM.from_pretrained(self.study.model, dtype=torch.float32)
        found = self._judged(PeftModel.from_pretrained(base, run / "adapter"))
        turns = [turn for turn in read_turns(run) if turn.phase == "train"]
        modelled = [record.modelled for record in read_records(run) if record.modelled]
        return {
            **found,
            "turns": {f"{turn.round}/{turn.device}": turn.loss for turn in turns},
            "device_link_bytes": sum(turn.bytes_up + turn.bytes_down for turn in turns),
            "device_peak_bytes": max(turn.peak_bytes for turn in turns),
            "modelled_radio_bytes": sum(r["uplink_bytes"] + r["downlink_bytes"] for r in modelled),
            "modelled_device_bytes": max(r["device_peak_bytes"] for r in modelled),
            "modelled_s": sum(r["delay_s"] for r in modelled),
            "modelled_j": sum(r["energy_j"] for r in modelled),
        }


Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""Members by name: what came of each seed."""


def floors(task: Task, found: Found) -> list[str]:
    """Return which floors the members of a task miss, in words."""
    missed = []
    means = {name: mean(seeds) for name, seeds in found.items()}
    central, before = means["central"], means["untrained"]
    for name, member in means.items():
        if name == "untrained":
            continue
        if member["loss"] > (1 + MARGIN) * central["loss"]:
            missed.append(f"{task.name} {name}: loss {member['loss']:.4f}, central's exceeded")
        if member["loss"] > CLEARLY * before["loss"]:
            missed.append(f"{task.name} {name}: loss {member['loss']:.4f}, hardly learnt")
        gain = member[task.better] - before[task.better]
        if task.better != "loss" and gain < POINTS:
            missed.append(f"{task.name} {name}: {task.better} {gain:+.1f} points only")
    for name in EXACT:
        pairs = zip(found.get(name, found["fedlora"]), found["fedlora"], strict=True)
        for seed, (member, whole) in enumerate(pairs):
            turns, same = member["turns"], whole["turns"]
            if turns.keys() != same.keys():
                missed.append(f"{task.name} {name}: its turns are not FedLoRA's ({seed})")
                continue
            apart = max(abs(turns[key] - same[key]) for key in same)
            if apart > EQUAL:
                missed.append(
                    f"{task.name} {name}: a turn's loss is {apart:.2g} from FedLoRA's ({seed})"
                )
    return missed


def mean(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of every figure over seeds, and the seeds' own if there are several."""
    each = [{key: value for key, value in one.items() if key != "turns"} for one in seeds]
    means: dict[str, Any] = {key: sum(one[key] for one in each) / len(each) for key in each[0]}
    return means | ({"seeds": each} if len(each) > 1 else {})


def summary(found: Found) -> dict[str, Any]:
    """Return a task's members as the JSON object has them: SplitFed by its cut."""
    kept = {name: mean(seeds) for name, seeds in found.items()}
    cuts = {name.removeprefix("splitfed_"): kept.pop(name) for name in list(kept) if name in EXACT}
    return {**kept, "splitfed": cuts}


def main() -> int:
    """Run what is not done yet, print all; exit 1 if a floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="folder with e2e, glue, gsm8k")
    parser.add_argument("--work", type=Path, default=Path("outputs/real"), help="for members")
    parser.add_argument("--quick", action="store_true", help="one task, four members")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="members at once")
    parser.add_argument("--accelerator", default="cpu", help="as run.accelerator")
    parser.add_argument("--docs", type=Path, help="write the figures into this folder's results.md")
    options = parser.parse_args()
    members, sizes = (QUICK, SHORT) if options.quick else (tuple(MEMBERS), FULL)
    work = options.work.resolve() / ("quick" if options.quick else "full")
    todo: list[tuple[Study, str]] = []
    for task, size in sizes.items():
        for seed in options.seeds:
            study = Study(
                task=task,
                size=size,
                model=str(Path(options.model).resolve()),
                data=options.data,
                folder=work / task / f"seed_{seed}",
                accelerator=options.accelerator,
                seed=seed,
            )
            study.prepare()
            # Without training there is nothing for a seed to change.
            own = [name for name in members if name != "untrained" or seed == options.seeds[0]]
            todo += [(study, name) for name in own]
    results: dict[str, Any] = {}
    missed: list[str] = []
    todo.sort(key=lambda each: each[1] in ALONE)
    n_beside = sum(name not in ALONE for _, name in todo)
    outcomes = [
        outcome
        for jobs, part in ((options.jobs, todo[:n_beside]), (1, todo[n_beside:]))
        for outcome in _members(part, jobs)
    ]
    for task, size in sizes.items():
        found: dict[str, list[dict[str, Any]]] = {}
        for (study, name), outcome in zip(todo, outcomes, strict=True):
            if study.task == task:
                found.setdefault(name, []).append(outcome)
        missed += floors(TASKS[task], found)
        results[task] = {"size": asdict(size), **summary(found)}
    settings = {"devices": DEVICES, "batch": BATCH, "r": RANK, "lr": LR, "seeds": options.seeds}
    result = {"settings": settings, "tasks": results, "missed": missed}
    print(tables(result))
    for line in missed:
        print(f"missed: {line}")
    if options.docs is not None:
        write_page(result, options.docs, "real_quick" if options.quick else "real")
    print(json.dumps(result))
    return int(bool(missed))


def _members(todo: Sequence[tuple[Study, str]], jobs: int) -> Iterable[dict[str, Any]]:
    """Yield what came of members, `jobs` of which run at once."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_member, todo)


def _member(what: tuple[Study, str]) -> dict[str, Any]:
    study, name = what
    return study.member(name)


if __name__ == "__main__":
    sys.exit(main())
