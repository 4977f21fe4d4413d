"""What to train on: which examples, cut to which length, held by whom."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit.data.partition import FLWR_PARTITIONERS, LOCAL, PARTITIONS
from fedsplit.errors import FedsplitError, require, require_choice

LABEL = "label"
LOSS_ON = ("target", "all", LABEL)
PADDING = FIXED, LONGEST = ("fixed", "longest")
FROM_FILES = ("e2e", "text", "chat")
SOURCES = ("stdlib", *FROM_FILES, "hub", "digits")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """A federated data set, as plain values that travel between nodes.

    Parameters
    ----------
    source : str
        "stdlib" (chapters of the Python language reference, the default), "e2e", "text", "chat",
        "hub" or "digits".
    path : str or None
        File or folder that "e2e", "text" and "chat" read; with the partition "local" each device
        has its own.
    encoding : str
        Of text files without a byte-order mark.
    name : str or None
        Data set on the Hugging Face hub, or a local folder that `datasets.load_dataset` reads.
    subset : str or None
        Configuration of the "hub" data set.
    train_split, test_split : str
        Splits of the "hub" data set; without a `test_split`, `test_fraction` is held out.
    text_column : str
        Column of plain texts ("text" from tables, "hub").
    prompt_column, target_column : str or None
        Columns of pairs; both or neither. They take the place of `text_column`.
    messages_column : str
        Column of conversations ("chat"). Where a row has none, its prompt and target make one:
        those of `prompt_column` and `target_column`, else of `prompt` and `completion`, else of
        `instruction`, `input` and `output`.
    template : str or None
        How a conversation becomes text: a name of `fedsplit.data.chat.TEMPLATES`; None takes the
        tokenizer's own.
    image_column : str or None
        Column of images ("hub"), for image classification; needs `label_column`.
    label_column : str or None
        Class of an image, or of a text with the loss on "label". For other text, what the partition
        goes by; by default each file is a group.
    pair_column : str or None
        Second texts, where pairs are to be classified; the first are in `text_column`.
    labels : tuple of str or None
        Names of the classes of texts, in the order of their numbers; None takes those that there
        are, sorted. With the partition "local" no one knows them all, so that they must be given.
    test_path : str or None
        File or folder that "text" reads its test set of; None holds out `test_fraction`.
    seq_len : int
        Tokens per sample.
    padding : str
        What samples that are shorter are padded to: "fixed" (`seq_len`), or "longest" (the longest
        of the batch, in steps of 8).
    packing : bool
        Whether pairs and conversations share rows of `seq_len` tokens, as many whole ones as fit;
        they do not see each other.
    loss_on : str
        For pairs, "target" (the prompt is not learnt) or "all"; "label" learns to classify texts.
    image_size : int
        Height and width that images are resized to, in pixels.
    partition : str or mapping
        "natural" (whole groups), "iid", "dirichlet" or "shard"; see `fedsplit.data.partition`.
        "local": every device reads all of its own path. Or a partitioner of flwr-datasets:
        ``{"_target_": "flwr_datasets.partitioner.NAME", ...}`` with its settings.
    alpha : float
        Concentration of "dirichlet": the smaller, the less alike the devices.
    shards_per_device : int
        Shards that "shard" gives each device.
    min_samples : int
        Examples that every device holds at least.
    max_samples : int or None
        Examples drawn of the training and of the test set; None takes all.
    test_fraction : float
        Share of every device's examples held out where the source has no test set.

    Raises
    ------
    FedsplitError
        If a value is out of range.
    """

    source: str = "stdlib"
    path: str | None = None
    encoding: str = "utf-8"
    name: str | None = None
    subset: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    text_column: str = "text"
    prompt_column: str | None = None
    target_column: str | None = None
    messages_column: str = "messages"
    template: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    pair_column: str | None = None
    labels: tuple[str, ...] | None = None
    test_path: str | None = None
    seq_len: int = 128
    padding: str = "fixed"
    packing: bool = False
    loss_on: str = "target"
    image_size: int = 32
    partition: str | dict[str, Any] = "natural"
    alpha: float = 0.5
    shards_per_device: int = 2
    min_samples: int = 2
    max_samples: int | None = None
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        require_choice("data.source", self.source, SOURCES)
        require_choice("data.loss_on", self.loss_on, LOSS_ON)
        require_choice("data.padding", self.padding, PADDING)
        self._check_where()
        self._check_partition()
        self._check_labels()
        require(_is_encoding(self.encoding), "data.encoding", self.encoding, "one that Python has")
        require(self.seq_len >= 2, "data.seq_len", self.seq_len, "at least 2")
        require(self.image_size >= 1, "data.image_size", self.image_size, "at least 1")
        require(0 < self.alpha < float("inf"), "data.alpha", self.alpha, "above 0 and finite")
        require(
            self.shards_per_device >= 1,
            "data.shards_per_device",
            self.shards_per_device,
            "at least 1",
        )
        require(
            self.min_samples >= 2,
            "data.min_samples",
            self.min_samples,
            "at least 2 (one to train on, one to test on)",
        )
        require(
            self.max_samples is None or self.max_samples >= 1,
            "data.max_samples",
            self.max_samples,
            "at least 1, or null for all",
        )
        require(
            0 < self.test_fraction < 1,
            "data.test_fraction",
            self.test_fraction,
            "between 0 and 1, both excluded",
        )
        require(
            (self.prompt_column is None) == (self.target_column is None),
            "data.prompt_column",
            self.prompt_column,
            "given together with data.target_column, or not at all",
        )
        require(
            self.image_column is None or self.label_column is not None,
            "data.label_column",
            self.label_column,
            "given where data.image_column is",
        )

    def _check_where(self) -> None:
        if self.source in FROM_FILES and self.partition != LOCAL:
            given = self.path not in (None, "")
            require(given, "data.path", self.path, f"given for source {self.source!r}")
        if self.source == "hub":
            given = self.name not in (None, "")
            require(given, "data.name", self.name, "given for source 'hub'")

    def _check_labels(self) -> None:
        learnt = self.loss_on == LABEL
        text = self.source in ("text", "hub") and self.image_column is None
        require(text or not learnt, "data.loss_on", LABEL, "target or all: only texts are labelled")
        given = self.label_column is not None or not learnt
        require(given, "data.label_column", None, "given with data.loss_on=label")
        for name in ("pair_column", "labels"):
            value = getattr(self, name)
            require(value is None or learnt, f"data.{name}", value, "null without loss_on=label")
        if self.labels is not None:
            fits = len(set(self.labels)) == len(self.labels) >= 2
            require(fits, "data.labels", self.labels, "null, or at least two different names")
        local = self.partition == LOCAL
        pairs = self.source in ("chat", "e2e") or self.prompt_column is not None
        packs = not self.packing or (pairs and not learnt)
        require(
            packs, "data.packing", True, "false but for pairs and chat (texts are joined anyhow)"
        )
        known = self.labels is not None or not (learnt and local)
        require(known, "data.labels", None, "given with data.partition=local")
        shared = self.test_path is None or (self.source == "text" and not local)
        require(shared, "data.test_path", self.test_path, "null: only shared text has such a file")

    def _check_partition(self) -> None:
        if isinstance(self.partition, Mapping):
            target = str(self.partition.get("_target_"))
            if not target.startswith(FLWR_PARTITIONERS) or target == FLWR_PARTITIONERS:
                raise FedsplitError(
                    f"data.partition._target_={target!r}: must be {FLWR_PARTITIONERS}NAME"
                )
            return
        require_choice("data.partition", self.partition, (*PARTITIONS, LOCAL))
        require(
            self.partition != LOCAL or self.source in FROM_FILES,
            "data.partition",
            self.partition,
            f"another one than 'local' for source {self.source!r}, which is not read from files",
        )


def _is_encoding(name: str) -> bool:
    try:
        "a".encode(name)
    except (LookupError, ValueError):
        return False
    return True
