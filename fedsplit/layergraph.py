"""A model as a graph of layers: plain arrays that solvers read. Nothing here imports torch.

`fedsplit.models.graph` fills a `LayerGraph` in from a real model.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError, require
from fedsplit.profiles import ModelProfile

_COSTS = (
    "forward_flops",
    "backward_flops",
    "parameter_bytes",
    "adapter_bytes",
    "activation_bytes",
    "output_bytes",
    "gradient_bytes",
)
_NO_PAIRS: NDArray[np.int64] = np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerGraph:
    """A directed acyclic graph of layers, vertices in topological order.

    FLOPs (a multiply-add counts two) and the bytes of activations, outputs and gradients are for
    **one sample**; parameter and adapter bytes are once per model.

    Parameters
    ----------
    name : str
        Model name, for tables.
    labels : tuple of str
        One readable name per vertex.
    edges : int array, shape [n_edges, 2]
        (parent, child) pairs with parent < child, each once.
    n_inputs : int
        The first vertices are the model's inputs (token ids, labels, pixels); they belong to the
        device.
    forward_flops, backward_flops : float array, shape [n]
    parameter_bytes, adapter_bytes : float array, shape [n]
        All parameters, and the trainable ones alone.
    activation_bytes : float array, shape [n]
        What automatic differentiation saves for the backward pass.
    output_bytes : float array, shape [n]
        Size of the vertex's output, sent up when a child is on the server.
    gradient_bytes : float array, shape [n]
        Size of the gradient that comes back for it; 0 where no gradient is needed.
    block : int array, shape [n]
        Transformer block of the vertex; -1 before the first, the block count after the last.
    requires : int array, shape [n_requires, 2]
        Pairs (v, u): v on the device requires u on the device, without a tensor between them
        (trainable parameters in several vertices, reads before an in-place write).
    members : tuple of tuple of str
        Names of the operations folded into each vertex.

    Raises
    ------
    FedsplitError
        If shapes differ, an edge does not run forward, or a cost is negative or not finite.
    """

    name: str
    labels: tuple[str, ...]
    edges: NDArray[np.int64]
    n_inputs: int
    forward_flops: Array
    backward_flops: Array
    parameter_bytes: Array
    adapter_bytes: Array
    activation_bytes: Array
    output_bytes: Array
    gradient_bytes: Array
    block: NDArray[np.int64]
    requires: NDArray[np.int64] = field(default_factory=_NO_PAIRS.copy)
    members: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        n = len(self.labels)
        require(n > 0, "labels", self.labels, "at least one vertex")
        require(1 <= self.n_inputs <= n, "n_inputs", self.n_inputs, f"1 to {n}")
        for name in (*_COSTS, "block"):
            values = getattr(self, name)
            require(values.shape == (n,), f"{name}.shape", values.shape, str((n,)))
        for name in _COSTS:
            values = getattr(self, name)
            bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
            if bad.size:
                raise FedsplitError(
                    f"{name}[{bad[0]}]={values[bad[0]]!r}: must be finite and not negative"
                )
        for name in ("edges", "requires"):
            pairs = getattr(self, name)
            require(pairs.ndim == 2 and pairs.shape[1] == 2, f"{name}.shape", pairs.shape, "[*, 2]")
            inside = pairs.size == 0 or (pairs.min() >= 0 and pairs.max() < n)
            require(bool(inside), name, pairs.tolist(), f"vertices 0 to {n - 1}")
        forward = self.edges[:, 0] < self.edges[:, 1]
        require(bool(forward.all()), "edges", self.edges[~forward].tolist(), "parent < child")
        unique = np.unique(self.edges, axis=0)
        require(len(unique) == len(self.edges), "edges", self.edges.tolist(), "each pair once")

    @property
    def n(self) -> int:
        """Number of vertices."""
        return len(self.labels)

    @property
    def n_blocks(self) -> int:
        """Number of blocks that the graph knows of; 0 without any."""
        return max(int(self.block.max()), 0)

    @cached_property
    def n_children(self) -> NDArray[np.int64]:
        """Number of children of each vertex, shape [n]."""
        return np.bincount(self.edges[:, 0], minlength=self.n)

    @cached_property
    def is_chain(self) -> bool:
        """Whether every vertex feeds the next one and nothing else."""
        follows = np.arange(self.n - 1)
        return len(self.edges) == self.n - 1 and bool(
            (np.sort(self.edges[:, 0]) == follows).all() and (np.diff(self.edges) == 1).all()
        )

    def check_device(self, device: NDArray[np.bool_]) -> None:
        """Raise unless `device`, bool [n], holds the inputs, and all that its vertices need.

        Raises
        ------
        FedsplitError
            Naming the first vertex that is missing.
        """
        require(device.shape == (self.n,), "device.shape", device.shape, str((self.n,)))
        missing = np.flatnonzero(~device[: self.n_inputs])
        if missing.size:
            raise FedsplitError(f"device: input {self.labels[missing[0]]!r} must be inside")
        needs = np.concatenate([self.edges[:, ::-1], self.requires])
        broken = needs[device[needs[:, 0]] & ~device[needs[:, 1]]]
        if broken.size:
            vertex, needed = broken[0]
            raise FedsplitError(
                f"device: vertex {vertex} ({self.labels[vertex]}) needs vertex {needed} "
                f"({self.labels[needed]}), which is not inside"
            )

    def crossing(self, device: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the vertices on the device with a child on the server, bool [n]."""
        parent, child = self.edges[:, 0], self.edges[:, 1]
        sent = np.zeros(self.n, dtype=bool)
        sent[parent[device[parent] & ~device[child]]] = True
        return sent

    @classmethod
    def from_profile(cls, profile: ModelProfile, input_bytes: float = 0.0) -> "LayerGraph":
        """Return `profile` as a chain: input, embeddings, blocks, head.

        `input_bytes` is the raw size of one sample. As far as a unit's workspace exceeds that of
        all units before it, it counts to its activations, so that a device part's sum is its peak.
        """
        require(
            np.isfinite(input_bytes) and input_bytes >= 0, "input_bytes", input_bytes, "at least 0"
        )
        units = (profile.embed, *profile.blocks, profile.head)
        n = len(units) + 1
        follows = np.arange(n - 1)

        def column(name: str) -> Array:
            return np.array([0.0, *(getattr(unit, name) for unit in units)])

        boundary = column("boundary_bytes")
        adapter = column("adapter_bytes")
        trained_above = np.cumsum(adapter) > 0
        workspace = np.maximum.accumulate(column("workspace_bytes"))
        kept = column("activation_bytes") * profile.pace.at_once
        return cls(
            name=profile.name,
            labels=("input", "embed", *(f"block {i}" for i in range(profile.n_blocks)), "head"),
            edges=np.stack([follows, follows + 1], axis=1),
            n_inputs=1,
            forward_flops=column("forward_flops"),
            backward_flops=column("backward_flops"),
            parameter_bytes=column("parameter_bytes"),
            adapter_bytes=adapter,
            activation_bytes=kept + np.diff(workspace, prepend=0.0),
            output_bytes=np.concatenate([[input_bytes], boundary[1:]]),
            gradient_bytes=np.where(trained_above, boundary, 0.0),
            block=np.maximum(np.arange(n) - 2, -1),
        )
