"""Memory as the allocator would see it: which tensors an operation makes, and how many bytes live at once."""

import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def _tensors(value) -> Iterator[torch.Tensor]:
    """The tensors with a storage of their own among the arguments or results of an operation."""
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


class PeakTensor(TorchDispatchMode):
    """Records the largest tensor and the peak of live bytes that PyTorch allocates inside the context.

    Every operation, those of the backward pass included, passes through the mode. A storage counts from the
    operation that creates it until it is freed; a view counts nothing, and neither do storages that existed
    before the context (the inputs of what you measure). So the figures are exact, the same on every machine, and
    also valid for tensors on the device `"meta"`, which lets you measure shapes that fit into no memory.
    Buffers that an operation allocates and frees inside itself, such as the workspace of a matrix product, are
    not seen.

    Args:
        ignore: shapes of tensors that are not counted, for example those of the gradients that you need anyway.

    Attributes:
        largest_bytes: bytes of the largest tensor made.
        largest_shape: its shape.
        largest_dtype: its dtype, or None while nothing was made.
        peak_bytes: the maximum over time of the bytes alive.
        live_bytes: bytes alive now.
        made_bytes: bytes made in all, freed or not.

    Example:
        >>> with PeakTensor() as memory:
        ...     total = torch.ones(100, 10).mul(2).sum()
        >>> memory.largest_shape, memory.largest_bytes, memory.peak_bytes
        ((100, 10), 4000, 8000)
    """

    def __init__(self, ignore: Iterable[Sequence[int]] = ()):
        super().__init__()
        self._ignore = {tuple(shape) for shape in ignore}
        self._sizes: dict[int, int] = {}  # of every storage seen and alive: its bytes, 0 if it does not count
        self.largest_bytes = self.peak_bytes = self.live_bytes = self.made_bytes = 0
        self.largest_shape: tuple[int, ...] = ()
        self.largest_dtype: torch.dtype | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _tensors((args, tuple(kwargs.values()))):
            self._note(tensor, counts=False)
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            self._note(tensor, counts=tuple(tensor.shape) not in self._ignore)
        return result

    def _note(self, tensor: torch.Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            # the Python object lives as long as the storage, so it reports when the memory is freed
            weakref.finalize(storage, self._free, key).atexit = False
            if counts:
                self._grow(key, storage.nbytes(), tensor)
        elif self._sizes[key] and storage.nbytes() > self._sizes[key]:  # resized, as `out=` does
            self._grow(key, storage.nbytes(), tensor)

    def _grow(self, key: int, size: int, tensor: torch.Tensor) -> None:
        added = size - self._sizes[key]
        self._sizes[key] = size
        self.live_bytes += added
        self.made_bytes += added
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if size > self.largest_bytes:
            self.largest_bytes, self.largest_shape, self.largest_dtype = (
                size,
                tuple(tensor.shape),
                tensor.dtype,
            )

    def _free(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)
