"""CUDA graphs without a GPU: what is launched during a capture is noted, and done when replayed.

As on a GPU, a capture itself changes nothing, and a replay sees what lies at the addresses of the
capture: numbers that Python had in its hands then stay as they were, and so do choices.
"""

import gc
from contextlib import nullcontext

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")  # they wait for results


def refuse_what_is_not_capturable(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    """As Adam's own check does on a GPU; SGD has none."""
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise RuntimeError("capture of step() but param_groups' capturable is False")


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.launched, self.replays, self.pool = [], 0, None

    def replay(self) -> None:
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for operation, args, kwargs, results in self.launched:
                for old, new in zip(results, tree_leaves(operation(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


class capture(TorchDispatchMode):
    """Stands in for torch.cuda.graph."""

    def __init__(self, graph: Graph, pool=None, stream=None):
        super().__init__()
        self.graph = graph
        self.graph.pool = pool

    def __enter__(self):
        # Of exactly these types: a compiler leaves some behind that have no memory.
        found = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))
        tensors = [x for x in found if x.device.type == "cpu"]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        self.before = [(storage, storage.clone()) for storage in storages.values()]
        self.hook = register_optimizer_step_pre_hook(refuse_what_is_not_capturable)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hook.remove()
        for storage, content in self.before:
            storage.copy_(content)
        if error[0] is not None:
            # torch.cuda.graph ends the capture, which fails as well and hides the cause.
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.name() in REFUSED:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = operation(*args, **(kwargs or {}))
        self.graph.launched.append((operation, args, kwargs or {}, tree_leaves(results)))
        return results


class Stream:
    def wait_stream(self, other) -> None:
        pass


def emulate(monkeypatch) -> list[Graph]:
    """Let torch.cuda's names for graphs mean these; the graphs that are made from now on."""
    made = []

    def new_graph() -> Graph:
        made.append(Graph())
        return made[-1]

    stand_ins = {"CUDAGraph": new_graph, "graph": capture, "Stream": Stream}
    stand_ins |= {"graph_pool_handle": object}
    stand_ins |= {"current_stream": Stream, "stream": lambda stream: nullcontext()}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made
