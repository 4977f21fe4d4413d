"""Time from a graph and a channel to the best cut, on real models and against other solvers."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array
from torch import Tensor, nn

from fedsplit.errors import FedsplitError
from fedsplit.layergraph import LayerGraph
from fedsplit.models import ModelSpec
from fedsplit.models.graph import layer_graph
from fedsplit.models.profile import profile_graph, profile_model
from fedsplit.planning import CutLimits, CutSolver, CutSystem
from fedsplit.planning.cut_cost import CutWeights, cut_weights
from fedsplit.planning.exhaustive import every_cut

IMAGES = "image-classification"
SPECS = {
    "gpt2": ModelSpec(model_type="gpt2"),
    "llama-7b": ModelSpec(model_type="llama"),
    "qwen2-7b": ModelSpec(model_type="qwen2"),
    "gemma-7b": ModelSpec(model_type="gemma"),
    "mixtral-8x7b": ModelSpec(model_type="mixtral"),
    "bert-base": ModelSpec(model_type="bert", config={"is_decoder": True}),
    "vit-base": ModelSpec(model_type="vit", task=IMAGES, target_modules="all-linear"),
    "resnet-50": ModelSpec(model_type="resnet", task=IMAGES, train="full"),
    "efficientnet-b7": ModelSpec(model_type="efficientnet", task=IMAGES, train="full"),
}
TORCHVISION = ("densenet121", "googlenet", "inception_v3")
RATES_BPS = (3e6, 3e7, 3e8, 3e9)
ROUNDS = 15
EXHAUSTIVE_LIMIT = 200_000


def systems() -> list[CutSystem]:
    """Return a device of 5.3 TFLOP/s and a server of 38.7 on channels from poor to good."""
    return [
        CutSystem(
            device_flops_per_s=5.3e12,
            server_flops_per_s=38.7e12,
            uplink_bps=rate,
            downlink_bps=2 * rate,
            steps=10,
            batch=16,
        )
        for rate in RATES_BPS
    ]


def measure_cuts(rounds: int = ROUNDS) -> dict[str, dict[str, float | None]]:
    """Return median milliseconds per cut for every model, contenders interleaved.

    Returns
    -------
    dict
        By model: `vertices`; `general`, `blockwise` with the graph prepared (as between rounds);
        `general_first`, `blockwise_first` with its preparation; `chain`, the scan of the model's
        blocks; `networkx`, `scipy_lp` and `exhaustive` (None where there are too many cuts); and
        `gap`, the largest relative difference between the general cut and any other method.
    """
    return {name: _measure(graph, chain, rounds) for name, graph, chain in _models()}


def _models() -> Iterator[tuple[str, LayerGraph, LayerGraph | None]]:
    for name, spec in SPECS.items():
        graph = profile_graph(spec, seq_len=128, batch=2)
        chain = None
        if graph.n_blocks:
            chain = LayerGraph.from_profile(profile_model(spec, 128, 2), 1024.0)
        yield name, graph, chain
    yield "gpt2, 2 blocks", _two_blocks(), None
    models = _torchvision()
    for name in TORCHVISION if models is not None else ():
        yield name, _torchvision_graph(models, name), None


def _two_blocks() -> LayerGraph:
    spec = ModelSpec(model_type="gpt2", config={"num_hidden_layers": 2})
    return profile_graph(spec, seq_len=128, batch=2)


def _torchvision() -> Any:
    """Return torchvision's models if it is installed, for whatever build of torch."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision.models


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(x), labels)


def _torchvision_graph(models: Any, name: str) -> LayerGraph:
    changes = {} if name == "densenet121" else {"aux_logits": False, "init_weights": False}
    with torch.device("meta"):
        model = _WithLoss(getattr(models, name)(**changes)).train()
    size = 299 if name == "inception_v3" else 224
    inputs = {"x": torch.zeros(2, 3, size, size), "labels": torch.zeros(2, dtype=torch.long)}
    return layer_graph(model, inputs, name=name)


def _measure(graph: LayerGraph, chain: LayerGraph | None, rounds: int) -> dict[str, float | None]:
    limits = CutLimits(min_blocks=1 if graph.n_blocks else 0)
    solver = CutSolver(graph)
    contenders: dict[str, Callable[[CutSystem], float]] = {
        "general": lambda system: solver.solve(system, limits, "general").objective,
        "blockwise": lambda system: solver.solve(system, limits, "blockwise").objective,
    }
    slow: dict[str, Callable[[CutSystem], float]] = {
        "general_first": lambda s: CutSolver(graph).solve(s, limits, "general").objective,
        "blockwise_first": lambda s: CutSolver(graph).solve(s, limits, "blockwise").objective,
        "networkx": lambda system: _by_networkx(graph, system, limits),
        "scipy_lp": lambda system: _by_linear_program(graph, system, limits),
    }
    every = _every_cut(graph, limits)
    if every is not None:
        slow["exhaustive"] = lambda system: _by_trying(graph, system, every)
    if chain is not None:
        blocks = CutSolver(chain)
        contenders["chain"] = lambda system: blocks.solve(system, limits, "chain").objective
    spent: dict[str, list[float]] = {name: [] for name in (*contenders, *slow)}
    gap = 0.0
    for turn in range(rounds + 1):
        for system in systems():
            # The slow ones join in the first rounds alone.
            taking_part = {**contenders, **slow} if turn <= 1 else contenders
            found = {}
            for name, solve in taking_part.items():
                start = time.perf_counter()
                found[name] = solve(system)
                if turn:
                    spent[name].append(1e3 * (time.perf_counter() - start))
            rest = [value for name, value in found.items() if name != "chain"]
            gap = max(gap, max(abs(value / found["general"] - 1) for value in rest))
    times: dict[str, float | None] = {name: median(values) for name, values in spent.items()}
    return {"vertices": graph.n, "chain": None, "exhaustive": None, **times, "gap": gap}


def _forced(graph: LayerGraph, limits: CutLimits) -> NDArray[np.bool_]:
    floor = limits.min_blocks
    return (np.arange(graph.n) < graph.n_inputs) | ((graph.block < floor) & (floor > 0))


def _objective(graph: LayerGraph, weights: CutWeights, device: NDArray[np.bool_]) -> float:
    sent = graph.crossing(device)
    parts = (weights.device[device], weights.server[~device], weights.transfer[sent])
    return float(sum(part.sum() for part in parts))


def _by_networkx(graph: LayerGraph, system: CutSystem, limits: CutLimits) -> float:
    weights = cut_weights(graph, system)
    scale = 1e12 / float(weights.server.sum())
    network = nx.DiGraph()
    forced = _forced(graph, limits)
    for v in range(graph.n):
        network.add_edge("s", v, capacity=int(scale * weights.server[v]))
        if forced[v]:
            network.add_edge("s", v)  # without capacity: infinite
        network.add_edge(v, "t", capacity=int(scale * weights.device[v]))
        network.add_edge(v, ("sent", v), capacity=int(scale * weights.transfer[v]))
    for parent, child in graph.edges.tolist():
        network.add_edge(("sent", parent), child)
        network.add_edge(child, parent)
    network.add_edges_from(graph.requires.tolist())
    for edge in [("s", v) for v in np.flatnonzero(forced).tolist()]:
        del network.edges[edge]["capacity"]
    _, (device, _) = nx.minimum_cut(network, "s", "t")
    inside = np.zeros(graph.n, dtype=bool)
    inside[[v for v in device if isinstance(v, int)]] = True
    return _objective(graph, weights, inside)


def _by_linear_program(graph: LayerGraph, system: CutSystem, limits: CutLimits) -> float:
    weights, n = cut_weights(graph, system), graph.n
    parent, child = graph.edges[:, 0], graph.edges[:, 1]
    n_edges, n_needs = len(graph.edges), len(graph.requires)
    edge, need = np.arange(n_edges), 2 * n_edges + np.arange(n_needs)
    row = np.concatenate([edge, edge, edge, n_edges + edge, n_edges + edge, need, need])
    column = np.concatenate(
        [parent, child, n + parent, child, parent, graph.requires[:, 0], graph.requires[:, 1]]
    )
    signs = (1, -1, -1, 1, -1)
    value = np.concatenate(
        [*(np.full(n_edges, sign) for sign in signs), np.ones(n_needs), -np.ones(n_needs)]
    )
    height = 2 * n_edges + n_needs
    matrix = csr_array((value, (row, column)), shape=(height, 2 * n))
    lower = np.concatenate([_forced(graph, limits).astype(float), np.zeros(n)])
    scale = float(weights.server.sum())
    cost = np.concatenate([weights.device - weights.server, weights.transfer]) / scale
    bounds = np.stack([lower, np.ones(2 * n)], axis=1)
    answer = linprog(cost, matrix, np.zeros(height), bounds=bounds, method="highs")
    return float(answer.fun + 1) * scale


def _every_cut(graph: LayerGraph, limits: CutLimits) -> NDArray[np.bool_] | None:
    """Return all possible device parts, or None where they are too many to try."""
    if (graph.requires[:, 1] > graph.requires[:, 0]).any():
        return None  # a vertex may need a later one: not found by going in order
    try:
        return every_cut(graph, limits.min_blocks, EXHAUSTIVE_LIMIT)
    except FedsplitError:
        return None


def _by_trying(graph: LayerGraph, system: CutSystem, every: NDArray[np.bool_]) -> float:
    weights = cut_weights(graph, system)
    return min(_objective(graph, weights, device) for device in every)
