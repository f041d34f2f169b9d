"""Host memory that CUDA kernels address over the bus: pinned, and seen as a CUDA tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MAPPED = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped


class PinnedView:
    """Pins a CPU tensor's memory and shows it as a CUDA tensor, without a copy.

    ``tensor`` has the shape and dtype of ``memory``. Kernels read and write it at the speed of the bus.

    Args:
        memory: contiguous uint8 tensor on the CPU, page-aligned; kept alive.
        device: a CUDA device.

    Raises:
        RuntimeError: the driver does not pin the memory (its limit, or no such device).
    """

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        self._memory: Tensor | None = memory
        self._address = memory.data_ptr()
        with torch.cuda.device(device):
            runtime = torch.cuda.cudart()
            status = runtime.cudaHostRegister(self._address, memory.nbytes, _MAPPED)
            if int(status) != 0:
                self._memory = None
                raise RuntimeError(
                    f"MemoryBank: CUDA cannot pin {memory.nbytes / 1e9:.1f} GB of host memory (error {int(status)}): "
                    "use a smaller cache, or raise the limit of locked memory (ulimit -l)"
                )
            self.tensor = torch.as_tensor(_Array(memory), device=device)

    def close(self) -> None:
        """Unpin the memory, once no kernel uses it. ``tensor`` must not be used any more."""
        if self._memory is not None:
            torch.cuda.synchronize(self.tensor.device)
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._memory = None

    def __deepcopy__(self, _: Any) -> PinnedView:
        raise TypeError(
            "MemoryBank: rows in pinned host memory cannot be copied; save the bank and load it again"
        )

    def __del__(self) -> None:
        self.close()


class _Array:
    """The CUDA array interface of memory that the driver knows: its address is the same on both sides."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory  # lives as long as the tensor made of this
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(memory.shape),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 2,
        }
