"""Memory of tiles that are used up, for the tiles that are read next."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np

KEPT_BYTES = 64 * 2**20


class Buffers:
    """Arrays of bytes whose memory comes back when the last tensor or view of one is gone.

    Megabytes that are freed and asked for anew are handed over page by page, each emptied by the kernel first. At most
    ``kept`` bytes wait to be used again, of arrays of one size; safe to share between threads.
    """

    def __init__(self, kept: int = KEPT_BYTES) -> None:
        self.kept = kept
        self._free: deque[np.ndarray] = deque()

    def __len__(self) -> int:
        """Arrays that wait to be used again."""
        return len(self._free)

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 array of ``shape``, its content undefined."""
        size = math.prod(shape)
        memory = self._last()
        if memory is None or memory.size != size:  # of another size: let go
            memory = np.empty(size, dtype=np.uint8)
        # NumPy gives a view of a view the first array of the chain as its base. Through a memoryview that is `lent`, not
        # `memory`, so that any view keeps it.
        lent = np.frombuffer(memory.data, dtype=np.uint8)
        weakref.finalize(lent, self._back, memory).atexit = False
        return lent.reshape(shape)

    def _last(self) -> np.ndarray | None:
        """The one used last, which a cache of the processor may still hold."""
        try:
            return self._free.pop()
        except IndexError:
            return None

    def _back(self, memory: np.ndarray) -> None:
        if (len(self._free) + 1) * memory.size <= self.kept:
            self._free.append(memory)
