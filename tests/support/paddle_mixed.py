"""Mixed precision of Paddle on a CPU, where Paddle's own autocast does nothing.

Two stand-ins for a GPU. ``types`` traces a function into a graph: there Paddle's autocast follows
its rules on every device, so the graph has the casts and types of a GPU. ``Rounding`` computes
numbers: what is in Paddle's white list takes and gives values that are rounded to bfloat16, in
float32.
"""

from collections import defaultdict
from contextlib import contextmanager

from support.native import lively_state, tiny_spec

from triptych import backends

KERNELS = {"conv2d": "conv2d", "matmul": "matmul", "linear": "linear_v2"}
"""Kernels of the white list that the networks use -> their names there."""


def build(monkeypatch, case="moco_v3_vit", precision="bfloat16", **sections):
    """An engine in a lively state. It has the forms of a GPU and may be in bfloat16."""
    package = backends.load("paddle")
    from triptych.backends.paddle import layers, sharded, vit

    for module in (layers, sharded, vit):
        monkeypatch.setattr(module, "plain_forms_serve", lambda x: True)
    every = (*package.PRECISIONS["cuda"], "float64")
    monkeypatch.setitem(package.PRECISIONS, "cpu", every)
    monkeypatch.setattr(package, "_check_bfloat16", lambda device: None)
    spec = tiny_spec(precision, case, **sections)
    return package.build(spec, lively_state(spec))


def narrow(x):
    """float32, rounded to bfloat16. So is the gradient."""
    import paddle

    if isinstance(x, paddle.Tensor) and x.dtype == paddle.float32:
        return x.astype(paddle.bfloat16).astype(paddle.float32)
    return x


class Rounding:
    """In the place of ``paddle.amp.auto_cast``.

    Attributes:
        on: whether the call is within autocast.
        calls: kernel -> calls outside and within autocast.
    """

    def __init__(self, monkeypatch):
        import paddle
        from paddle.amp import amp_lists

        self.on = False
        self.calls = defaultdict(lambda: [0, 0])
        white = amp_lists.white_list()["bfloat16"]["O1"]
        for name, listed in KERNELS.items():
            assert listed in white
            monkeypatch.setattr(paddle._C_ops, name, self._rounded(name))
        monkeypatch.setattr(paddle.amp, "auto_cast", self.auto_cast)

    @contextmanager
    def auto_cast(self, enable=True, *lists, dtype="float16", level="O1", **others):
        """See ``paddle.amp.auto_cast``; recomputation asks the tracer whether it was on."""
        from paddle.base import core, framework

        assert not enable or (dtype, level) == ("bfloat16", "O1")
        tracer, former = framework._dygraph_tracer(), self.on
        kept = tracer._amp_level, tracer._amp_dtype
        self.on = enable
        tracer._amp_level = core.AmpLevel.O1 if enable else core.AmpLevel.O0
        tracer._amp_dtype = "bfloat16" if enable else "float32"
        try:
            yield
        finally:
            self.on, (tracer._amp_level, tracer._amp_dtype) = former, kept

    def _rounded(self, name):
        import paddle

        kernel = getattr(paddle._C_ops, name)

        def rounded(*arguments, **options):
            self.calls[name][self.on] += 1
            if not self.on:
                return kernel(*arguments, **options)
            return narrow(kernel(*map(narrow, arguments), **options))

        return rounded


def types(monkeypatch, compute, part, arguments):
    """Operation -> types of its inputs and results, in a graph of ``compute(part, *arguments)``.

    The CPU's batch norm has no bfloat16: it gets float32 here, and "batch_norm" are the types that
    a GPU's gets: of the values, and of statistics and weights.

    Returns:
        The types by operation; and the types of what the function returns.
    """
    import paddle

    kernel, found = paddle._C_ops.batch_norm, defaultdict(set)

    def batch_norm(x, *arguments):
        parameters = {str(t.dtype)[7:] for t in arguments[:4] if t is not None}
        found["batch_norm"].add((str(x.dtype)[7:], *parameters))
        y, *statistics = kernel(x.astype("float32"), *arguments)
        return y.astype(x.dtype), *statistics

    monkeypatch.setattr(paddle._C_ops, "batch_norm", batch_norm)

    def traced():
        return compute(part, *arguments)

    graph = paddle.jit.to_static(traced, full_graph=True).get_concrete_program()[0]
    for operation in graph.main_program.global_block().ops:
        name = operation.name().removeprefix("pd_op.")
        if name not in ("cast", "batch_norm"):
            values = [*operation.operands_source(), *operation.results()]
            found[name] |= {_type(value) for value in values if value.is_dense_tensor_type()}
    return found, {_type(value) for value in paddle.utils.flatten(graph.outputs)}


def _type(value):
    return str(value.dtype).rpartition(".")[2]
