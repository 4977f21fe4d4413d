"""The tasks of `benchmarks.real`: what is trained on, and what an answer to a test item is worth.

Everything here is plain transformers; nothing of fedsplit takes part in judging. Test items come
from the data sets' own test files, less those whose prompt is in the training files too.
"""

import csv
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED = 0
LABELS = ("negative", "positive")
_FINAL = re.compile(r"####\s*(-?[\d,.]+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt, what may be answered (the first is what the loss is of), and the right label."""

    prompt: str
    answers: tuple[str, ...]
    label: int = 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of the benchmark.

    Parameters
    ----------
    name : str
        What it is called.
    chat : bool
        Whether prompts are what a user says; else prompt and answer are lines of a text.
    seq_len : int
        Tokens of a sample at most.
    new_tokens : int
        Tokens that an answer has at most, where it is written.
    read : callable
        ``read(folder) -> train, test``: items of all of the data set.
    score : callable
        ``score(items, answers) -> metrics`` of the answers that a model wrote, or the labels.
    labels : tuple of str
        Where an answer is one of these, the likeliest; nothing is written then.
    better : str
        The metric that has to improve over the untrained model.
    """

    name: str
    chat: bool
    seq_len: int
    new_tokens: int
    read: Callable[[Path], tuple[list[Item], list[Item]]]
    score: Callable[[Sequence[Item], Sequence[str]], dict[str, float]]
    labels: tuple[str, ...] = ()
    better: str


def read_e2e(folder: Path) -> tuple[list[Item], list[Item]]:
    """Meaning representations to sentences; all references of one are its answers."""
    return _pairs(folder / "e2e" / "devset.csv"), _grouped(folder / "e2e" / "testset_w_refs.csv")


def read_sst2(folder: Path) -> tuple[list[Item], list[Item]]:
    """Sentences of film reviews and whether they are negative or positive."""

    def read(name: str) -> list[Item]:
        with (folder / "glue" / "SST-2" / name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [
            Item(
                prompt=f"Review: {row['sentence'].strip()}\nSentiment:",
                answers=(LABELS[int(row["label"])],),
                label=int(row["label"]),
            )
            for row in rows
        ]

    return read("train.tsv"), read("dev.tsv")


def read_gsm8k(folder: Path) -> tuple[list[Item], list[Item]]:
    """Questions of school mathematics with worked answers."""

    def read(name: str) -> list[Item]:
        lines = (folder / "gsm8k" / name).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [Item(prompt=row["question"], answers=(row["answer"],)) for row in rows]

    return read("train.jsonl"), read("test.jsonl")


def _pairs(file: Path) -> list[Item]:
    with file.open(encoding="utf-8", newline="") as stream:
        return [Item(prompt=r["mr"], answers=(r["ref"],)) for r in csv.DictReader(stream)]


def _grouped(file: Path) -> list[Item]:
    found: dict[str, list[str]] = {}
    for item in _pairs(file):
        found.setdefault(item.prompt, []).extend(item.answers)
    return [Item(prompt=prompt, answers=tuple(refs)) for prompt, refs in found.items()]


def score_texts(items: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    """BLEU of sacrebleu over all, and the mean of the best ROUGE-L of rouge-score (both 0-100)."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    width = max(len(item.answers) for item in items)
    references = [
        [item.answers[i] if i < len(item.answers) else None for item in items] for i in range(width)
    ]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [
        max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in item.answers)
        for item, answer in zip(items, answers, strict=True)
    ]
    bleu = sacrebleu.corpus_bleu(list(answers), references).score  # type: ignore[arg-type]
    return {"bleu": bleu, "rouge_l": 100 * sum(rouge) / len(rouge)}


def score_labels(items: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    """Share of the right labels, in percent."""
    right = [a == item.answers[0] for item, a in zip(items, answers, strict=True)]
    return {"accuracy": 100 * sum(right) / len(right)}


def score_numbers(items: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    """Share of answers whose final number is that of the worked answer, in percent."""
    right = [
        _final(answer) == _final(item.answers[0])
        for item, answer in zip(items, answers, strict=True)
    ]
    return {"exact": 100 * sum(right) / len(right)}


def _final(text: str) -> str | None:
    marked = _FINAL.search(text)
    numbers = [marked[1]] if marked else _NUMBER.findall(text)
    return numbers[-1].replace(",", "").rstrip(".") if numbers else None


TASKS = {
    task.name: task
    for task in (
        Task(
            name="e2e",
            chat=False,
            seq_len=96,
            new_tokens=48,
            read=read_e2e,
            score=score_texts,
            better="bleu",
        ),
        Task(
            name="sst2",
            chat=False,
            seq_len=64,
            new_tokens=0,
            read=read_sst2,
            score=score_labels,
            labels=LABELS,
            better="accuracy",
        ),
        Task(
            name="gsm8k",
            chat=True,
            seq_len=256,
            new_tokens=160,
            read=read_gsm8k,
            score=score_numbers,
            better="loss",
        ),
    )
}


def draw(task: Task, folder: Path, n_train: int, n_test: int) -> tuple[list[Item], list[Item]]:
    """Return `n_train` and `n_test` items, the same ones every time, no test prompt trained on."""
    train, test = task.read(folder)
    seen = {item.prompt for item in train}
    rng = random.Random(SEED)
    unseen = [item for item in test if item.prompt not in seen]
    return rng.sample(train, min(n_train, len(train))), rng.sample(unseen, min(n_test, len(unseen)))


def encode(
    task: Task, tokenizer: PreTrainedTokenizerBase, item: Item, answer: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt, and those of `answer` after it with the end."""
    if task.chat:
        said = [{"role": "user", "content": item.prompt}]
        asked = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    else:
        asked = f"{item.prompt}\n"
    ask = tokenizer(asked, add_special_tokens=False).input_ids
    told = tokenizer(answer, add_special_tokens=False).input_ids
    return ask, [*told, tokenizer.eos_token_id]


@torch.no_grad()
def judge(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    n_written: int,
) -> dict[str, float]:
    """Return ``loss`` (nats per token of the first answers) and the task's metrics.

    Answers are written greedily, to the first `n_written` items.
    """
    model.eval()
    losses = _sums(task, model, tokenizer, [(item, item.answers[0]) for item in items])
    found = {"loss": sum(loss for loss, _ in losses) / sum(count for _, count in losses)}
    if task.labels:
        pairs = [(item, label) for item in items for label in task.labels]
        sums = [loss for loss, _ in _sums(task, model, tokenizer, pairs)]
        width = len(task.labels)
        rows = [sums[at : at + width] for at in range(0, len(sums), width)]
        answers = [task.labels[row.index(min(row))] for row in rows]
        return found | task.score(items, answers)
    some = items[:n_written]
    return found | task.score(some, _write(task, model, tokenizer, some))


def _sums(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Item, str]],
    size: int = 16,
) -> list[tuple[float, int]]:
    """Return the summed loss of each answer, and its tokens."""
    found: list[tuple[float, int]] = []
    for start in range(0, len(pairs), size):
        rows = [
            encode(task, tokenizer, item, answer) for item, answer in pairs[start : start + size]
        ]
        cut = [((ask + told)[: task.seq_len], len(ask)) for ask, told in rows]
        width = max(len(tokens) for tokens, _ in cut)
        ids, labels = (torch.full((len(cut), width), fill) for fill in (0, -100))
        mask = torch.zeros_like(ids)
        for row, (tokens, n_asked) in enumerate(cut):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, n_asked : len(tokens)] = ids[row, n_asked : len(tokens)]
            mask[row, : len(tokens)] = 1
        ids, labels, mask = (tensor.to(model.device) for tensor in (ids, labels, mask))
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none"
        )
        counts = (labels[:, 1:] != -100).sum(1).tolist()
        found += zip(each.sum(1).tolist(), counts, strict=True)
    return found


def _write(
    task: Task,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    size: int = 16,
) -> list[str]:
    """Return what the model writes after each prompt, greedily, padded on the left."""
    texts: list[str] = []
    end = tokenizer.eos_token_id
    for start in range(0, len(items), size):
        asked = [encode(task, tokenizer, item, "")[0] for item in items[start : start + size]]
        width = max(map(len, asked))
        ids = torch.full((len(asked), width), end)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(asked):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=task.new_tokens,
            do_sample=False,
            pad_token_id=end,
        )
        texts += tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def write_training_file(task: Task, items: Sequence[Item], folder: Path) -> Path:
    """Write `items` as `fedsplit run` reads them: a row each of prompt and completion."""
    file = folder / "train.jsonl"
    rows: list[Mapping[str, str]] = [
        {"prompt": item.prompt, "completion": item.answers[0]} for item in items
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
