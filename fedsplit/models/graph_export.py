"""Cuts that run: two modules from any cut of a model's graph.

`torch.export` records the model's operations; a cut copies them to the device's or to the server's
module. What depends on no data of the other side is copied to both.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from fedsplit.errors import FedsplitError
from fedsplit.layergraph import LayerGraph
from fedsplit.models.graph import fold
from fedsplit.models.graph_trace import trace
from fedsplit.models.private import unguarded

_DEVICE, _SERVER, _BOTH = "device", "server", "both"


@dataclass(frozen=True, eq=False)
class CutModules:
    """A model in two parts; they use the parameters of the model they come from.

    Parameters
    ----------
    device : fx.GraphModule
        Takes the model's inputs in order, returns the boundary tensors.
    server : fx.GraphModule
        Takes the boundary tensors, returns the loss.
    boundary : tuple of str
        Names of the boundary tensors; those of inputs that the server needs are among them.
    """

    device: fx.GraphModule
    server: fx.GraphModule
    boundary: tuple[str, ...]

    def step(self, *inputs: Tensor) -> Tensor:
        """Run forward and backward across the cut; gradients add up in the parameters.

        Returns the loss, detached.
        """
        sent: tuple[Tensor, ...] = self.device(*inputs)
        # Cloned, because the server may overwrite what it receives.
        received = [tensor.detach().clone() for tensor in sent]
        for tensor, twin in zip(sent, received, strict=True):
            twin.requires_grad_(tensor.requires_grad)
        loss: Tensor = self.server(*received)
        loss.backward()  # type: ignore[no-untyped-call]
        back = [
            (tensor, twin.grad)
            for tensor, twin in zip(sent, received, strict=True)
            if twin.grad is not None
        ]
        if back:
            torch.autograd.backward([pair[0] for pair in back], [pair[1] for pair in back])
        return loss.detach()


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A model as a graph whose cuts can be run.

    Parameters
    ----------
    graph : LayerGraph
        What planners read; its members are names of nodes of `module`.
    module : fx.GraphModule
        The whole model: takes the inputs in order, returns the loss.
    """

    graph: LayerGraph
    module: fx.GraphModule

    def split(self, device: NDArray[np.bool_]) -> CutModules:
        """Return the two parts of the cut with the vertices `device` (bool, [n]) on the device.

        Raises
        ------
        FedsplitError
            If a vertex on the device needs one that is not.
        """
        self.graph.check_device(device)
        nodes = list(self.module.graph.nodes)
        sides = self._sides(nodes, device)
        (loss,) = nodes[-1].all_input_nodes
        stateful = [node for node in nodes if node.is_impure() and node.op == "call_function"]
        behind = _needed([loss, *(node for node in stateful if sides[node] == _SERVER)], sides)
        boundary = [node for node in nodes if node in behind and sides[node] == _DEVICE]
        before = _needed([*boundary, *(node for node in stateful if sides[node] == _DEVICE)])
        inputs = [node for node in nodes if node.op == "placeholder"]
        return CutModules(
            _extract(self.module, inputs, [n for n in nodes if n in before], tuple(boundary)),
            _extract(self.module, boundary, [n for n in nodes if n in behind], loss),
            tuple(node.name for node in boundary),
        )

    def _sides(self, nodes: list[fx.Node], device: NDArray[np.bool_]) -> dict[fx.Node, str]:
        planned = {
            name: _DEVICE if on_device else _SERVER
            for members, on_device in zip(self.graph.members, device, strict=True)
            for name in members
        }
        sides: dict[fx.Node, str] = {}
        waiting: list[fx.Node] = []
        for node in nodes:
            around = {sides[item] for item in node.all_input_nodes if item.op != "placeholder"}
            if node.name in planned:
                sides[node] = planned[node.name]
                # Counters of a layer change where the layer is.
                sides.update(dict.fromkeys(waiting, sides[node]))
                waiting.clear()
            elif around <= {_BOTH}:
                sides[node] = _BOTH
                if node.is_impure() and not node.users:
                    waiting.append(node)
            else:
                sides[node] = _SERVER if _SERVER in around else _DEVICE
        return sides


def export(
    model: nn.Module, inputs: Mapping[str, Tensor], name: str | None = None
) -> ExportedModel:
    """Return `model` as a graph whose cuts can be run, with the model's own parameters.

    Parameters
    ----------
    model : nn.Module
        In the mode (training or evaluation) that it will run in. Takes `inputs` as keywords,
        returns a scalar loss or an output that holds one.
    inputs : mapping of str to Tensor
        A batch; the modules take batches of the same shapes.
    name : str, optional
        Name of the graph; the model's class without it.

    Raises
    ------
    FedsplitError
        If the model returns no scalar loss.
    """
    exported = torch.export.export(model, (), dict(inputs), strict=False)
    whole = unguarded(exported)
    nodes = list(whole.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    loss = next((n for n in nodes[-1].all_input_nodes if n.meta["val"].dim() == 0), None)
    if loss is None:
        raise FedsplitError(f"model={type(model).__name__!r}: must return a scalar loss")
    module = _extract(whole, placeholders, nodes[:-1], loss)
    samples = next(iter(inputs.values())).shape[0]
    traced = trace(module, dict(zip((n.name for n in placeholders), inputs.values(), strict=True)))
    return ExportedModel(fold(traced, samples, name or type(model).__name__), module)


def _needed(wanted: list[fx.Node], sides: Mapping[fx.Node, str] | None = None) -> set[fx.Node]:
    """Return `wanted` and all that it needs; with `sides`, up to where the device's part begins."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if sides is None or sides[node] != _DEVICE:
                stack += node.all_input_nodes
    return found


def _extract(
    root: fx.GraphModule,
    inputs: list[fx.Node],
    nodes: list[fx.Node],
    result: fx.Node | tuple[fx.Node, ...],
) -> fx.GraphModule:
    """Return the part of `root` that computes `result` from `inputs` by way of `nodes`."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(map_arg(result, copies.__getitem__))
    return fx.GraphModule(root, graph)
