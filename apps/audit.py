"""``fedsplit audit``: what an honest but curious server reads of what a configuration sends it.

The server has texts of its own, of the devices' domain and of another, and learns from them: it
runs them through the device's half with the same codec and the same defence, so that every attack
is trained on defended boundaries. What it then reads of the devices' test texts is counted.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from fedsplit.data import Batch, DataSpec, Samples, load_data, load_device
from fedsplit.data.partition import LOCAL
from fedsplit.errors import FedsplitError, require
from fedsplit.flower import Job
from fedsplit.flower.server.checkpoint import load_checkpoint
from fedsplit.models import SplitModel, load, read_tokenizer
from fedsplit.plan import DEVICE, Segment, Turn
from fedsplit.privacy import (
    Learner,
    Observed,
    Reader,
    guessing,
    labels_from_gradient,
    nearest_embedding,
    success,
)
from fedsplit.privacy.updates import FirstInputs, UpdateReader
from fedsplit.seeds import derive_seed, generator

from .audit_report import Attack, Audit, Update, defence_name, write_audits
from .check import require_budget, require_codecs, require_data, require_folder, require_model
from .config import data_spec, job, load_config, require_plain
from .observe import Sender
from .outputs import make_folder
from .scenario import build_system, check_first_round
from .server_app import build_scheme
from .sweep import members

SAME, OTHER = "same", "other"
NEAREST, RIDGE, INVERTER = "nearest", "ridge", "inverter"
COUNTS = (20, 150)
PRIVATE = 40
TURNS = 8
_RUN_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server whose success is measured.

    Parameters
    ----------
    counts : tuple of int
        Numbers of texts of its own that it is tried with, of either domain.
    private : int
        Texts of the devices' that it reads, at most.
    other : tuple of str
        Overrides of the group ``data`` that give texts of another domain; without any, Python's
        documentation, unless that is what the devices have.
    """

    counts: tuple[int, ...] = COUNTS
    private: int = PRIVATE
    other: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        valid = len(self.counts) > 0 and all(count >= 2 for count in self.counts)
        require(valid, "--texts", list(self.counts), "numbers of at least 2")
        require(self.private >= 1, "--private", self.private, "at least 1")

    def other_data(self, mine: DataSpec) -> DataSpec | None:
        """Return the texts of another domain than `mine`; None where there are none."""
        if not self.other:
            other = DataSpec(seq_len=mine.seq_len)
            return None if mine.source == other.source else other
        words = [word if word.startswith("data") else f"data.{word}" for word in self.other]
        given = data_spec(load_config(words))
        return replace(given, seq_len=mine.seq_len)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The devices' texts, and the server's own by domain: the larger part of `COUNTS` each."""

    private: tuple[Batch, ...]
    auxiliary: Mapping[str, tuple[Batch, ...]]


def audit(
    words: Sequence[str],
    *,
    multirun: bool,
    server: Server,
    console: Console,
    output: Path | None = None,
) -> int:
    """Attack what `words` describe, print a table, and leave it with a plot in a folder.

    Parameters
    ----------
    words : sequence of str
        Overrides as for ``fedsplit run``; or one folder of a run, whose adapters are then used.
    multirun : bool
        Whether overrides may sweep, as for ``fedsplit plan -m``.
    server : Server
        Who attacks.
    output : Path or None
        Where to write; else as configured, or a folder named by the time of day.

    Raises
    ------
    FedsplitError
        If a configuration is wrong, before anything is attacked.
    """
    run = _run_folder(words)
    if run:
        configs = {str(run): load_config((f"resume={run}",))}
    else:
        found = members(words, multirun)
        configs = {member.name: load_config(member.overrides) for member in found}
    for config in configs.values():
        _check(config, server)
    given = next((config.output for config in configs.values() if config.output), None)
    folder = output or Path(given or f"outputs/audit_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    require_folder(folder)
    adapters = load_checkpoint(run).adapters if run else {}
    audits: list[Audit] = []
    for name, config in configs.items():
        for item in audit_configuration(config, server, name=name, adapters=adapters):
            audits.append(item)
            console.print(item.sentence(), highlight=False, soft_wrap=True)
    write_audits(audits, make_folder(folder), console)
    return 0


def audit_configuration(
    config: DictConfig, server: Server, *, name: str, adapters: Mapping[str, Tensor]
) -> list[Audit]:
    """Return what each kind of turn in the first planned round gives away.

    Turns differ by route and codec. `adapters` take the place of fresh ones, where given.
    """
    work, data = job(config), data_spec(config)
    torch.set_num_threads(config.run.server_threads)
    system = build_system(config)
    turns = {
        (str(turn.route), str(turn.codec)): turn
        for branch in check_first_round(build_scheme(config), system).branches
        for turn in branch.turns
        if len(turn.route.segments) > 1
    }
    texts = _texts(work, data, server)
    model = load(work.model)
    held = model.adapters(Segment(DEVICE, 0, model.n_blocks)) | dict(adapters)
    audits = []
    for turn in turns.values():
        sender = Sender(
            model=model, route=turn.route, codec=turn.codec, privacy=work.privacy, adapters=held
        )
        label = name if len(turns) == 1 else f"{name} {turn.route}"
        named = {"name": label, "model": system.profile.name}
        audits.append(attack(sender, texts, work, server, turn=turn, named=named))
    return audits


def attack(
    sender: Sender,
    texts: Texts,
    work: Job,
    server: Server,
    *,
    turn: Turn,
    named: Mapping[str, str],
) -> Audit:
    """Return what a server reads of `texts` that a device sends.

    `named` are the audit's ``name`` and ``model``.
    """
    labels, guessed_labels = _labels(sender, texts.private, work)
    defence = defence_name(work.privacy, work.model.bottleneck)
    if "input_ids" not in texts.private[0].inputs:
        return Audit.of(turn, defence, labels=labels, **named)
    private, told = sender.observe(texts.private, derive_seed(work.seed, "audit"))
    told = torch.where(told >= 0, told, guessed_labels)
    model = sender.model
    embedding = embeddings(model)
    attacks = [_attack(NEAREST, "none", 0, nearest_embedding(embedding), private, told)]
    guess = 0.0
    for domain, own in texts.auxiliary.items():
        seen, _ = sender.observe(own, derive_seed(work.seed, "audit", domain))
        if domain == SAME:
            guess = guessing(seen.tokens, private.tokens)
        for count in sorted({min(count, len(seen.lengths)) for count in server.counts}):
            auxiliary = seen.first(count)
            for kind, reader in readers(auxiliary, embedding, work.seed).items():
                attacks.append(_attack(kind, domain, count, reader, private, told))
    return Audit.of(
        turn,
        defence,
        **named,
        labels=labels,
        told=float((told == private.tokens).double().mean()),
        guessing=guess,
        norm=_norm(private, work.privacy.unit),
        attacks=tuple(attacks),
        update=None if turn.frozen else _update(sender, texts, work, turn.steps),
    )


def readers(auxiliary: Observed, embedding: Tensor, seed: int) -> dict[str, Reader]:
    """Return the attacks that learn from texts of the server's own, by name."""
    learner = Learner(auxiliary, embedding)
    return {RIDGE: learner.ridge(), INVERTER: learner.inverter(derive_seed(seed, "inverter"))}


def embeddings(model: SplitModel) -> Tensor:
    """Return the input embeddings of a model, centred, ``[vocabulary, width]``."""
    weight = model.model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().float()
    return weight - weight.mean(0)


def _attack(
    kind: str, domain: str, count: int, reader: Reader, private: Observed, told: Tensor
) -> Attack:
    read = reader(private)
    alone = success(read, private.tokens, private.lengths)
    joined = success(torch.where(told >= 0, told, read), private.tokens, private.lengths)
    most = max(alone.tokens, joined.tokens)
    return Attack(kind, domain, count, alone.tokens, alone.rouge_l, most)


def _labels(sender: Sender, private: Sequence[Batch], work: Job) -> tuple[float, Tensor]:
    """Return the share of labels that the server learns, and the tokens that these tell it.

    On an open route they are sent. On a U-shaped one it finds them in the gradients of what it
    sent home; the tokens are of the shape of an `Observed`'s, -1 where nothing was found.
    """
    language = work.model.task == "causal-lm"
    masks = [_mask(batch) for batch in private]
    nothing = torch.full((sum(int(mask.sum()) for mask in masks),), -1)
    if not sender.route.returns_home:
        return 1.0, nothing
    right = total = 0
    told = []
    pairs = sender.returned(private, work.optimizer, derive_seed(work.seed, "audit", "labels"))
    for batch, mask, (sent, came) in zip(private, masks, pairs, strict=True):
        gradient, labels = came[0], batch.inputs["labels"]
        if gradient is None:
            continue
        scores = sender.tail(batch.inputs, sent)
        guessed = labels_from_gradient(scores, sent.tensors[0].float(), gradient.float())
        if not language:
            right, total = right + int((guessed == labels).sum()), total + labels.numel()
            continue
        # Scores at a position are of the next token.
        felt = gradient.norm(dim=-1) > 0
        tokens = torch.full_like(labels, -1)
        tokens[:, 1:] = torch.where(felt, guessed, -1)[:, :-1]
        learnt = labels[:, 1:] >= 0
        right += int((tokens == labels)[:, 1:][learnt].sum())
        total += int(learnt.sum())
        told.append(tokens[mask])
    return right / max(total, 1), torch.cat(told) if told else nothing


def _update(sender: Sender, texts: Texts, work: Job, steps: int) -> Update | None:
    """Return what the adapters tell of a turn on private texts.

    The server learns from turns of its own, of as many steps.
    """
    inputs = FirstInputs.of(sender.model) if work.model.train == "lora" else None
    if inputs is None:
        return None
    own = texts.auxiliary[SAME]
    steps = min(steps, len(texts.private), len(own))
    read = inputs

    def turn(batches: Sequence[Batch], name: str) -> tuple[Tensor, Tensor]:
        seed = derive_seed(work.seed, "audit", "update", name)
        after = sender.trained(batches, work.optimizer, seed)
        return read.change(sender.adapters, after), torch.unique(_tokens(batches))

    draw = generator(work.seed, "audit", "updates")
    chosen = [draw.permutation(len(own))[:steps].tolist() for _ in range(TURNS)]
    try:
        turns = [turn([own[i] for i in each], str(n)) for n, each in enumerate(chosen)]
        change, tokens = turn(texts.private[:steps], "private")
    except FedsplitError as error:  # of a model that has diverged
        return Update(steps, why_not=str(error))
    counts = torch.bincount(_tokens(own), minlength=len(inputs.vectors))
    reader = UpdateReader(inputs, turns, counts)
    named, guessed = (
        float(torch.isin(tokens, found).double().mean())
        for found in (reader.read(change, len(tokens)), reader.guess(len(tokens)))
    )
    return Update(steps, len(tokens), named, guessed)


def _tokens(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch.inputs["input_ids"][_mask(batch)] for batch in batches])


def _mask(batch: Batch) -> Tensor:
    ids = batch.inputs.get("input_ids", torch.zeros(0))
    return batch.inputs.get("attention_mask", torch.ones_like(ids)).bool()


def _norm(private: Observed, unit: str) -> float:
    """Return the median norm of what is clipped."""
    squares = private.vectors.double().square().sum(1)
    if unit == "sample":
        parts = torch.split(squares, list(private.lengths))
        squares = torch.stack([part.sum() for part in parts])
    return float(median(squares.sqrt().tolist()))


def _texts(work: Job, data: DataSpec, server: Server) -> Texts:
    """Return the devices' test texts, and as many as the server may have of both domains."""
    images = work.model.task == "image-classification"
    tokenizer = None if images else read_tokenizer(str(work.model.source))
    if data.partition == LOCAL:
        path = (work.data_paths or (None,))[0]
        mine = load_device(
            data, tokenizer, device=0, n_devices=work.n_devices, seed=work.seed, path=path
        )
        train, test = mine.train, mine.test
    else:
        whole = load_data(replace(data, partition="iid"), tokenizer, 1, work.seed)
        train, test = whole.train(0), whole.test(0)
    most = max(server.counts)
    auxiliary = {SAME: _some(train, most, work, SAME)}
    other = server.other_data(data) if tokenizer is not None else None
    if other is not None:
        samples = load_data(replace(other, partition="iid"), tokenizer, 1, work.seed).train(0)
        auxiliary[OTHER] = _some(samples, most, work, OTHER)
    private = _some(test, server.private, work, "private")
    return Texts(private=private, auxiliary=auxiliary)


def _some(samples: Samples, count: int, work: Job, name: str) -> tuple[Batch, ...]:
    """Return at most `count` of the samples, in a random order."""
    order = generator(work.seed, "audit", name).permutation(len(samples))[:count].tolist()
    size = work.batch_size
    chunks = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    return tuple(Batch(samples.select(chunk), chunk) for chunk in chunks)


def _run_folder(words: Sequence[str]) -> Path | None:
    """Return the folder of a run, if that is what `words` name."""
    if len(words) != 1 or "=" in words[0]:
        return None
    folder = Path(words[0]).expanduser()
    require((folder / _RUN_FILE).is_file(), "RUN", words[0], "KEY=VALUE, or the folder of a run")
    return folder


def _check(config: DictConfig, server: Server) -> None:
    """Refuse what cannot be audited."""
    require_plain(config)
    require_codecs(config)
    work, data = job(config), data_spec(config)
    require_budget(work.privacy)
    require_model(work.model, data)
    require_data(work, data)
    server.other_data(data)
