"""Cuts of real models' graphs: two solvers that share no code find the same optimum."""

from functools import cache

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import csr_array

from fedsplit.layergraph import LayerGraph
from fedsplit.models import ModelSpec
from fedsplit.models.profile import profile_graph
from fedsplit.planning import CutLimits, CutSolver, CutSystem
from fedsplit.planning.cut_cost import cut_weights

FOUR = {"num_hidden_layers": 4}
MODELS = {
    "gpt2": ModelSpec(model_type="gpt2"),
    "llama": ModelSpec(model_type="llama", config=FOUR),
    "qwen2": ModelSpec(model_type="qwen2", config=FOUR),
    "gemma": ModelSpec(model_type="gemma", config=FOUR),
    "mixtral": ModelSpec(model_type="mixtral", config=FOUR),
    "bert": ModelSpec(model_type="bert", config={"is_decoder": True}),
    "bert-full": ModelSpec(model_type="bert", config={"is_decoder": True}, train="full"),
    "vit": ModelSpec(model_type="vit", task="image-classification", target_modules="all-linear"),
    "resnet": ModelSpec(model_type="resnet", task="image-classification", train="full"),
    "efficientnet": ModelSpec(
        model_type="efficientnet",
        task="image-classification",
        train="full",
        config={
            "image_size": 224,
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "hidden_dim": 1280,
        },
    ),
}


@cache
def graph_of(name: str) -> LayerGraph:
    return profile_graph(MODELS[name], seq_len=32, batch=2)


def best_by_linear_program(graph: LayerGraph, system: CutSystem, min_blocks: int) -> float:
    """Return the least objective by HiGHS.

    x_v is 1 on the device, y_v at least x_v - x_c for every child c; the constraints are totally
    unimodular, so that the relaxation has whole solutions.
    """
    weights, n = cut_weights(graph, system), graph.n
    parent, child = graph.edges[:, 0], graph.edges[:, 1]
    vertex, needed = graph.requires[:, 0], graph.requires[:, 1]
    rows = (
        [((p, 1), (c, -1), (n + p, -1)) for p, c in zip(parent, child, strict=True)]
        + [((c, 1), (p, -1)) for p, c in zip(parent, child, strict=True)]
        + [((v, 1), (u, -1)) for v, u in zip(vertex, needed, strict=True)]
    )
    entries = [(row, at, value) for row, terms in enumerate(rows) for at, value in terms]
    row, column, value = (np.array(part) for part in zip(*entries, strict=True))
    matrix = csr_array((value, (row, column)), shape=(len(rows), 2 * n))
    forced = (np.arange(n) < graph.n_inputs) | ((graph.block < min_blocks) & (min_blocks > 0))
    bounds = [(1 if on else 0, 1) for on in forced] + [(0, 1)] * n
    scale = float(weights.server.sum())
    cost = np.concatenate([weights.device - weights.server, weights.transfer]) / scale
    answer = linprog(cost, matrix, np.zeros(len(rows)), bounds=bounds, method="highs")
    assert answer.success
    return float(answer.fun + 1) * scale


@pytest.mark.parametrize("name", MODELS)
def test_flow_blockwise_and_linear_program_agree(name: str) -> None:
    graph = graph_of(name)
    solver = CutSolver(graph)
    for uplink, device_flops, min_blocks in (
        (1e6, 1e12, 0),
        (5e7, 1e12, 1),
        (1e9, 1e12, 1),
        (1e9, 5e13, 0),
        (1e8, 1e14, 2),
    ):
        min_blocks = min(min_blocks, graph.n_blocks)
        system = CutSystem(
            device_flops_per_s=device_flops,
            server_flops_per_s=3.8e13,
            uplink_bps=uplink,
            downlink_bps=2 * uplink,
            steps=5,
            batch=8,
        )
        best = best_by_linear_program(graph, system, min_blocks)
        for method in ("general", "blockwise"):
            found = solver.solve(system, CutLimits(min_blocks=min_blocks), method)
            assert found.objective == pytest.approx(best, rel=2e-6)


def test_the_best_cut_of_an_adapted_language_model_sends_one_hidden_state() -> None:
    graph = graph_of("gpt2")
    system = CutSystem(
        device_flops_per_s=1e12,
        server_flops_per_s=3.8e13,
        uplink_bps=1e8,
        downlink_bps=1e8,
        batch=8,
    )
    found = CutSolver(graph).solve(system, CutLimits(min_blocks=3))
    assert found.n_blocks == 3
    sent = graph.crossing(found.device)
    hidden = 32 * 768 * 4
    inputs = np.arange(graph.n) < graph.n_inputs
    assert graph.output_bytes[sent & ~inputs].sum() == hidden
