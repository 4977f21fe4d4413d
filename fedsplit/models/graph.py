"""Any model as a `LayerGraph`, with what costs nothing folded away."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from fedsplit.arrays import Array
from fedsplit.layergraph import LayerGraph
from fedsplit.models.graph_trace import Operation, Parameter, Trace, trace


def layer_graph(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    blocks: Sequence[str] = (),
    name: str | None = None,
) -> LayerGraph:
    """Return the operations of `model` as a graph.

    Parameters
    ----------
    model : nn.Module
        Takes `inputs` as keywords, returns a scalar loss or an output with ``.loss``. Its weights
        are not read, so a model on the meta device will do.
    inputs : mapping of str to Tensor
        A batch; its first dimension is the number of samples.
    blocks : sequence of str
        Names of the modules that are the model's blocks.
    name : str, optional
        Name of the graph; the model's class without it.

    Raises
    ------
    FedsplitError
        If the model returns no scalar loss, or what it computes depends on the data.
    """
    traced = trace(model, inputs, blocks)
    samples = next(iter(inputs.values())).shape[0]
    return fold(traced, samples, name or type(model).__name__)


def fold(traced: Trace, samples: int, name: str) -> LayerGraph:
    """Return the graph of `traced`, a batch of `samples`, without vertices that cost nothing.

    What depends on no input, or on inputs alone without arithmetic that counts (attention masks,
    positions), is computed wherever it is needed and is no vertex. A view joins what it looks at.
    An operation without FLOPs, with one parent whose only child it is, joins that parent if its
    output is no larger, and its own only child if it is larger: the optimal cut never lies there.
    """
    vertices = _vertices(traced)
    _merge(vertices, traced.parameters)
    return _pack(vertices, traced, samples, name)


class _Vertex:
    """An operation on its way into the graph; `parents` are indices of operations."""

    def __init__(self, operation: Operation, parents: set[int], parameters: set[int]) -> None:
        self.operation = operation
        self.parents = parents
        self.parameters = parameters
        self.before = set(operation.before)
        self.forward = operation.forward_flops
        self.backward = operation.backward_flops
        self.saved = operation.saved_bytes
        self.output = operation.output_bytes
        self.gradient = operation.gradient_bytes
        self.members: tuple[str, ...] = (operation.name,)
        self.children: set[int] = set()

    @property
    def is_free(self) -> bool:
        return self.forward == 0 and self.backward == 0

    def absorb(self, other: "_Vertex") -> None:
        """Add the costs of `other`; outputs and neighbours are for the caller."""
        self.parameters |= other.parameters
        self.before |= other.before
        self.forward += other.forward
        self.backward += other.backward
        self.saved += other.saved
        self.members += other.members


def _vertices(traced: Trace) -> dict[int, _Vertex]:
    """Return what depends on the inputs and leads to the result."""
    found: dict[int, _Vertex] = {}
    sources: dict[int, set[int]] = {}  # operation computed anywhere -> inputs it needs
    carried: dict[int, list[Operation]] = {}  # operation on weights alone -> what it took
    for index, operation in enumerate(traced.operations):
        if operation.is_input:
            found[index] = _Vertex(operation, set(), set())
            sources[index] = {index}
            continue
        constants = [parent for parent in operation.parents if parent in carried]
        of_inputs = [parent for parent in operation.parents if parent not in carried]
        work = [step for parent in constants for step in carried[parent]]
        if not of_inputs:
            carried[index] = [*work, operation]
            continue
        parameters = operation.parameters.union(*(step.parameters for step in work))
        parents = {source for parent in of_inputs for source in sources.get(parent, {parent})}
        replicable = (
            all(parent in sources for parent in of_inputs)
            and not parameters
            and not operation.differentiable
            and operation.forward_flops == 0
        )
        if replicable:
            sources[index] = parents
            continue
        vertex = _Vertex(operation, parents, parameters)
        for step in work:
            vertex.forward += step.forward_flops
            vertex.backward += step.backward_flops
            vertex.saved += step.saved_bytes
            step.forward_flops = step.backward_flops = step.saved_bytes = 0.0
        found[index] = vertex
    return _needed(found, traced.result)


def _needed(found: dict[int, _Vertex], result: int) -> dict[int, _Vertex]:
    needed = {result}
    for index in sorted(found, reverse=True):
        if index in needed:
            needed |= found[index].parents
    kept = {index: found[index] for index in found if index in needed or _is_input(found[index])}
    for index, vertex in kept.items():
        for parent in vertex.parents:
            kept[parent].children.add(index)
        vertex.before &= kept.keys()
    return kept


def _is_input(vertex: _Vertex) -> bool:
    return vertex.operation.is_input


def _merge(vertices: dict[int, _Vertex], parameters: list[Parameter]) -> None:
    """Fold vertices, in place, until nothing more can be folded."""
    into: dict[int, int] = {}
    changed = True
    while changed:
        changed = False
        for index in list(vertices):
            vertex = vertices[index]
            if len(vertex.parents) != 1 or _is_input(vertex) or not vertex.is_free:
                continue
            (parent_index,) = vertex.parents
            parent = vertices[parent_index]
            if _is_input(parent) or not vertex.before <= {parent_index}:
                continue
            if any(parameters[item].trainable for item in vertex.parameters):
                continue
            if vertex.operation.is_view and not vertex.parameters:
                _join_parent(vertices, index, parent_index)
                into[index] = parent_index
            elif parent.children != {index} or not vertex.children:
                continue
            elif vertex.output <= parent.output and vertex.gradient <= parent.gradient:
                parent.output, parent.gradient = vertex.output, vertex.gradient
                _join_parent(vertices, index, parent_index)
                into[index] = parent_index
            elif (
                len(vertex.children) == 1
                and vertex.output >= parent.output
                and vertex.gradient >= parent.gradient
            ):
                (child,) = vertex.children
                _join_child(vertices, index, child)
                into[index] = child
            else:
                continue
            changed = True
    for vertex in vertices.values():
        vertex.before = {_root(item, into) for item in vertex.before}


def _root(index: int, into: Mapping[int, int]) -> int:
    while index in into:
        index = into[index]
    return index


def _join_parent(vertices: dict[int, _Vertex], index: int, parent_index: int) -> None:
    vertex, parent = vertices.pop(index), vertices[parent_index]
    parent.absorb(vertex)
    parent.children = (parent.children - {index}) | vertex.children
    for child in vertex.children:
        vertices[child].parents = (vertices[child].parents - {index}) | {parent_index}


def _join_child(vertices: dict[int, _Vertex], index: int, child_index: int) -> None:
    vertex, child = vertices.pop(index), vertices[child_index]
    members = vertex.members + child.members
    child.absorb(vertex)
    child.members = members
    child.parents = (child.parents - {index}) | vertex.parents
    for parent in vertex.parents:
        vertices[parent].children = (vertices[parent].children - {index}) | {child_index}


def _pack(vertices: dict[int, _Vertex], traced: Trace, samples: int, name: str) -> LayerGraph:
    order = {index: position for position, index in enumerate(sorted(vertices))}
    ordered = [vertices[index] for index in order]
    sizes = traced.parameters

    def column(read: str) -> Array:
        return np.array([getattr(vertex, read) for vertex in ordered], dtype=np.float64) / samples

    edges = [
        (order[parent], order[index])
        for index, vertex in vertices.items()
        for parent in sorted(vertex.parents)
    ]
    requires = [
        (order[index], order[reader])
        for index, vertex in vertices.items()
        for reader in vertex.before - vertex.parents
        if reader != index
    ]
    users: dict[int, list[int]] = {}
    parameter_bytes, adapter_bytes = np.zeros(len(ordered)), np.zeros(len(ordered))
    for position, vertex in enumerate(ordered):
        for item in vertex.parameters:
            users.setdefault(item, []).append(position)
    for item, positions in users.items():
        # A frozen weight is copied to both sides; a trained one has to stay whole.
        if sizes[item].trainable:
            adapter_bytes[positions[0]] += sizes[item].n_bytes
            parameter_bytes[positions[0]] += sizes[item].n_bytes
            for first, second in itertools.pairwise(positions):
                requires += [(first, second), (second, first)]
        else:
            parameter_bytes[positions] += sizes[item].n_bytes
    return LayerGraph(
        name=name,
        labels=tuple(vertex.members[0] for vertex in ordered),
        edges=np.array(edges, dtype=np.int64).reshape(-1, 2),
        n_inputs=sum(map(_is_input, ordered)),
        forward_flops=column("forward"),
        backward_flops=column("backward"),
        parameter_bytes=parameter_bytes,
        adapter_bytes=adapter_bytes,
        activation_bytes=column("saved"),
        output_bytes=column("output"),
        gradient_bytes=column("gradient"),
        block=np.array([vertex.operation.block for vertex in ordered], dtype=np.int64),
        requires=np.unique(np.array(requires, dtype=np.int64).reshape(-1, 2), axis=0),
        members=tuple(vertex.members for vertex in ordered),
    )
