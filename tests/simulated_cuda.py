"""A CUDA device that is not there, for tests on machines without one.

Within `SimulatedCuda()`, tensors moved to "cuda" report that device while their values stay in main memory. Mixing
devices raises as CUDA does (0-dim CPU tensors and CPU indices pass, a CPU generator does not), and three costs that a
CPU hides are counted by the line of our code that caused them:

- `waits`: the host stops until the device has answered (item, tolist, nonzero, boolean indices, unique, copies back);
- `uploads`: blocking copies to the device, which are waits too;
- `launches`: operations that start a kernel. `attention` counts the kernels that SDPA could choose.

It cannot show a GPU's rounding, speed, memory and races, nor which operations CUDA lacks. One device, one process.

How it works: C++ takes `CudaTensor` for a CPU tensor, so autograd needs no CUDA build; only Python reads "cuda:0". A
function mode reroutes calls that name a device, and `__torch_dispatch__` sees every operation.
"""

import contextlib
import sys
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
MEMORY = 80 * 2**30
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The host must know the size of the result, or the result.
WAITS = _words("_local_scalar_dense nonzero masked_select unique_dim _unique _unique2 unique_consecutive bincount")
# These take tensors of both devices.
EITHER = _words("copy_ _to_copy set_ _has_compatible_shallow_copy_type equal_metadata")
# These take a CPU scalar beside device tensors, as pointwise operations do.
SCALARS = _words("where fill fill_ masked_fill masked_fill_ index_put index_put_ _index_put_impl_ _fused_adamw_")
INDEXING = _words("index _unsafe_index index_put index_put_ _index_put_impl_ _unsafe_index_put")
# No kernel is started.
FREE = _words("detach empty empty_like new_empty empty_strided _local_scalar_dense _unsafe_view _reshape_alias")
# autocast("cuda"): products in 16 bits, range-sensitive operations in float32.
HALF = _words(
    "linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm addbmm mv einsum scaled_dot_product_attention"
)
FULL = _words(
    "exp expm1 log log2 log10 log1p pow __pow__ softmax log_softmax sum prod cumsum cumprod norm rsqrt reciprocal "
    "logsumexp layer_norm group_norm cross_entropy nll_loss mse_loss kl_div"
)
_to, _load, _apply = torch.Tensor.to, torch.load, torch.nn.Module._apply
_active: "SimulatedCuda | None" = None


def _is_cuda(value) -> bool:
    return isinstance(value, CudaTensor)


def _names_cuda(device) -> bool:
    return isinstance(device, int | str | torch.device) and torch.device(device).type == "cuda"


def _count(counter: str, operation: str) -> None:
    if _active is not None:
        getattr(_active, counter)[_active.line(), operation] += 1


class CudaTensor(torch.Tensor):
    """Says cuda:0; `values` is the tensor in main memory."""

    @staticmethod
    def __new__(cls, values):
        view = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, device=CPU, **view)
        self._values = values
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return 0

    def data_ptr(self):
        return self._values.data_ptr()

    def untyped_storage(self):
        return self._values.untyped_storage()

    def tolist(self):
        _count("waits", "tolist")
        return self._values.tolist()

    def new_tensor(self, data, *, dtype=None, device=CUDA, **kwargs):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device, **kwargs)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __repr__(self, **kwargs):
        return f"{self._values!r} on cuda:0"

    def __deepcopy__(self, memo):
        memo[id(self)] = twin = CudaTensor(self._values.detach().clone()).requires_grad_(self.requires_grad)
        twin.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "_values"}
        return twin

    def __reduce_ex__(self, protocol):
        return _unpickled, (self._values.detach(), self.requires_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if torch.is_autocast_enabled("cuda") and name in HALF | FULL:
            dtype = torch.get_autocast_dtype("cuda") if name in HALF else torch.float32
            args, kwargs = tree_map(lambda x: x.to(dtype) if _is_cuda(x) and x.dtype in FLOATS else x, (args, kwargs))
        with _WithinOperation():
            return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _on_device(value):
    return CudaTensor(value) if isinstance(value, torch.Tensor) and not _is_cuda(value) else value


def _unpickled(values, requires_grad):
    to_cpu = _active is not None and _active.map_location is not None and not _names_cuda(_active.map_location)
    return (values if to_cpu else CudaTensor(values)).requires_grad_(requires_grad)


class _WithinOperation(TorchDispatchMode):
    """Constants that C++ makes inside an operation on the device are on the device."""

    # Inside Python code of ours, a tensor made without a device is the CPU's.
    asked_by_python = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.asked_by_python or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return tree_map(_on_device, func(*args, **{name: value for name, value in kwargs.items() if name != "device"}))


def _refuse_mixed_devices(func, name: str, args, tensors) -> None:
    strangers = [tensor for tensor in tensors if not _is_cuda(tensor)]
    if name in INDEXING:
        if not _is_cuda(args[0]) and any(map(_is_cuda, args[1])):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        indices = [index for index in args[1] if index is not None and not _is_cuda(index)]
        if indices:
            _count("uploads", name)
        strangers = [tensor for tensor in strangers if not any(tensor is index for index in indices)]
    scalars_pass = name in SCALARS or torch.Tag.pointwise in func.tags
    written = [arg for arg, spec in zip(args, func._schema.arguments, strict=False) if spec.is_write]
    for tensor in strangers if name not in EITHER else ():
        if tensor.dim() or not scalars_pass or any(tensor is each for each in written):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(aten::{name}, a CPU tensor of shape {list(tensor.shape)})"
            )


def _waits(name: str, args, kwargs) -> bool:
    if name in INDEXING:
        # A mask becomes numbers first, unless a single value is written where it is true.
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return by_mask and not (len(args) > 2 and args[2].numel() == 1)
    if name == "isin" and isinstance(args[1], torch.Tensor):
        # Beyond this size torch sorts, which it does by way of unique.
        return args[1].numel() >= int(10 * args[0].numel() ** 0.145)
    if name == "copy_":
        return _is_cuda(args[1]) and not _is_cuda(args[0])
    return name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None)


def _run(func, args, kwargs):
    """One operation of torch: checked, counted, and computed on the values."""
    name, parameters = func._schema.name.split("::")[1], {each.name for each in func._schema.arguments}
    leaves = tree_leaves((args, kwargs))
    by_values = {id(leaf._values): leaf for leaf in leaves if _is_cuda(leaf)}
    if not by_values:
        return func(*args, **kwargs)
    _refuse_mixed_devices(func, name, args, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    if _waits(name, args, kwargs):
        _count("waits", name)
    if not func.is_view and name not in FREE:
        _count("launches", name)
    if "generator" in parameters:
        kwargs = kwargs | {"generator": _of_device(kwargs.get("generator"))}
    if name == "mm" and "out_dtype" in parameters:
        # CUDA alone has this form.
        func, args = torch.ops.aten.mm.default, tuple(each.to(args[2]) for each in args[:2])
    args, kwargs = tree_map(
        lambda x: x._values if _is_cuda(x) else x,
        (args, {name: value for name, value in kwargs.items() if name != "device"}),
    )
    # What an operation returns in place is the very tensor that it was given.
    return tree_map(lambda x: by_values.get(id(x), _on_device(x)), func(*args, **kwargs))


class _Copy(torch.autograd.Function):
    """A copy on the other device; its gradient returns to where the tensor was."""

    @staticmethod
    def forward(ctx, tensor, device):
        ctx.device = tensor.device
        return CudaTensor(tensor.detach().clone()) if device.type == "cuda" else tensor._values.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.device), None


def _tensor_to(tensor, *args, **kwargs):
    target = kwargs.get("device", args[0] if args else None)
    if isinstance(target, torch.Tensor):
        target, args = target.device, (target.device, target.dtype)
    if not isinstance(target, int | str | torch.device):
        return _to(tensor, *args, **kwargs)
    target, blocking = torch.device(target), not (kwargs.get("non_blocking") or True in args[1:])
    dtypes = [each for each in (*args, kwargs.get("dtype")) if isinstance(each, torch.dtype)]
    if target.type == "meta":
        return _to(tensor._values if _is_cuda(tensor) else tensor, target, *dtypes)
    if tensor.device.type not in (target.type, "meta"):
        if target.type == "cpu":
            _count("waits", "to")
        elif blocking:
            _count("uploads", "to")
        tensor = _Copy.apply(tensor, target)
    return _to(tensor, *dtypes, copy=kwargs.get("copy", False)) if dtypes or kwargs.get("copy") else tensor


def _of_device(generator):
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    return generator or torch.cuda.default_generators[0]


class _Generator(torch._C.Generator):
    """torch.Generator, also for cuda."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.where = CUDA if _names_cuda(device) else CPU
        return self

    device = property(lambda self: self.where)


def _attention_kernel(query, key, value, attn_mask=None, enable_gqa=False, **kwargs) -> str:
    """The fastest kernel that SDPA could take on CUDA."""
    if attn_mask is not None:
        return "math" if enable_gqa or attn_mask.requires_grad else "efficient with a mask"
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        return "flash"
    return "math" if enable_gqa else "efficient"


class SimulatedCuda(TorchFunctionMode):
    """While it is open, "cuda" is a device. Counts belong to the innermost line under `watch`, a folder's name."""

    def __init__(self, watch: str = "dgrpo"):
        super().__init__()
        self.watch, self.map_location, self.depth = f"/{watch}/", None, 0
        self.waits, self.uploads, self.launches, self.attention = Counter(), Counter(), Counter(), Counter()

    def line(self) -> str:
        frame = sys._getframe(2)
        while frame is not None:
            path = frame.f_code.co_filename
            if self.watch in path and "/tests/" not in path and "site-packages" not in path:
                return f"{path.rsplit(self.watch, 1)[1]}:{frame.f_lineno}"
            frame = frame.f_back
        return "elsewhere"

    def counts(self, place: str = "") -> tuple[int, int, int]:
        """Waits, uploads and launches so far, of lines whose file starts with `place`."""
        return tuple(
            sum(number for (line, _), number in counter.items() if line.startswith(place))
            for counter in (self.waits, self.uploads, self.launches)
        )

    def report(self, most: int = 12) -> str:
        lines = []
        for name in ("waits", "uploads", "launches"):
            counter = getattr(self, name)
            lines.append(f"{name}: {counter.total()}")
            lines += [f"{number:8d}  {line} {operation}" for (line, operation), number in counter.most_common(most)]
        return "\n".join([*lines, f"attention: {dict(self.attention)}"])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        on_device = any(map(_is_cuda, tree_leaves((args, kwargs))))
        if _names_cuda(kwargs.get("device")) and not on_device:
            if func in (torch.tensor, torch.as_tensor, torch.asarray):
                return func(*args, **kwargs | {"device": CPU}).to(CUDA)
            if func in (torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal):
                kwargs["generator"] = _of_device(kwargs.get("generator"))
            return _on_device(func(*args, **kwargs | {"device": CPU}))
        if func is torch.Tensor.backward:
            names = ("gradient", "retain_graph", "create_graph", "inputs")
            given = dict(zip(names, args[1:], strict=False)) | kwargs
            given["grad_tensors"] = given.pop("gradient", None)
            func, args, kwargs = torch.autograd.backward, args[:1], given
        if func is torch.autograd.backward:
            # What a backward pass calls, such as a checkpoint's second forward pass, is seen as well.
            inside = _WithinOperation() if on_device else contextlib.nullcontext()
            with patch.object(torch.autograd, "has_torch_function", return_value=False), self, inside:
                return func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.attention[_attention_kernel(*args, **kwargs)] += 1
        before, _WithinOperation.asked_by_python = _WithinOperation.asked_by_python, not on_device
        try:
            return func(*args, **kwargs)
        finally:
            _WithinOperation.asked_by_python = before

    def __enter__(self):
        global _active
        if not self.depth:
            _active, self.patches = self, contextlib.ExitStack()
            for owner, name, value in _replacements(self):
                self.patches.enter_context(patch.object(owner, name, value, create=True))
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error):
        global _active
        super().__exit__(*error)
        self.depth -= 1
        if not self.depth:
            self.patches.close()
            _active = None


def _replacements(gpu: SimulatedCuda):
    """(owner, name, value) of everything in torch that must know the device."""

    def load(*args, map_location=None, **kwargs):
        with torch.serialization.safe_globals([_unpickled]):
            gpu.map_location = map_location
            try:
                loaded = _load(*args, map_location="cpu", **kwargs)
            finally:
                gpu.map_location = None
        put = _names_cuda(map_location)
        return tree_map(lambda x: x.to(CUDA) if put and isinstance(x, torch.Tensor) else x, loaded)

    def apply(module, *args, **kwargs):
        # Parameters stay the objects that they are, as optimizers and tied weights need.
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return _apply(module, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    yield torch, "Generator", _Generator
    yield torch, "load", load
    yield torch.nn.Module, "_apply", apply
    yield torch.Tensor, "to", _tensor_to
    yield torch.Tensor, "cuda", lambda self, *args, **kwargs: self.to(CUDA, **kwargs)
    yield torch.Tensor, "cpu", lambda self, *args, **kwargs: self.to(CPU)
    yield torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self
    yield torch.amp, "is_autocast_available", lambda device_type: True

    generator = _Generator("cuda")
    stream = SimpleNamespace(is_capturing=lambda: False, synchronize=lambda: None, wait_stream=lambda other: None)
    yield torch.cuda, "default_generators", (generator,)
    yield torch.cuda, "_initialized", True
    nothing = "_lazy_init init set_device empty_cache synchronize reset_peak_memory_stats"
    answers = dict.fromkeys(nothing.split()) | {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "current_stream": stream,
        "device": contextlib.nullcontext(),
        "get_device_capability": (9, 0),
        "get_device_name": "simulated",
        "get_device_properties": SimpleNamespace(total_memory=MEMORY, name="simulated", major=9, minor=0),
        "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
    }
    of_accelerator = {
        "is_available": True,
        "device_count": 1,
        "current_device_index": 0,
        "current_stream": stream,
        "current_accelerator": torch.device("cuda"),
        "synchronize": None,
    }
    for module, values in ((torch.cuda, answers), (torch.accelerator, of_accelerator)):
        for name, value in values.items():
            yield module, name, lambda *args, _value=value, **kwargs: _value
    for module in (torch.cuda, torch.cuda.random):
        yield module, "manual_seed", generator.manual_seed
        yield module, "manual_seed_all", generator.manual_seed
        yield module, "get_rng_state", lambda *args: generator.get_state()
        yield module, "set_rng_state", lambda state, *args: generator.set_state(state)
        yield module, "get_rng_state_all", lambda: [generator.get_state()]
        yield module, "set_rng_state_all", lambda states: generator.set_state(states[0])
