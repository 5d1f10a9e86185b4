"""Memory of large results, which is kept for the next ones.

A training step makes the same large tensors as the step before it: gradients, and what the way back needs. Where the C
library gives such memory back to the system each time, its pages come anew, cleared, and a step takes up to twice as
long (decision 59). So the kernels' results lie in a heap of our own, to which a part comes back when the last tensor in
it is gone.
"""

import bisect
import math
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1 << 22
"""Bytes from which on a result lies in the heap."""

STEP = 1 << 16
"""A part of the heap is a multiple of as many bytes."""

SEGMENT = 1 << 30
"""Bytes that are mapped at once; what was never written of them takes no memory."""

IDLE = 60.0
"""Seconds without a new result after which all that is free is given back."""


class Part(NamedTuple):
    """Some bytes of a segment."""

    segment: int
    begin: int
    end: int


class Heap:
    """Segments of memory whose parts are lent: the first that is large enough, for what was written is used again.

    After `idle` seconds without a new result a thread, which there is while anything is lent or kept, gives back what
    is free.
    """

    def __init__(self, idle: float = IDLE) -> None:
        self.idle = idle
        self.free: list[Part] = []
        """In order, no two of them side by side."""
        self._segments: list[mmap.mmap] = []
        self._back: deque[Part] = deque()
        self._watched: dict[int, weakref.ref[memoryview]] = {}
        self._lock = threading.Lock()
        self._last = 0.0
        self._keeper: threading.Thread | None = None

    def lend(self, count: int) -> memoryview:
        """Returns at least `count` writable bytes, which come back when nothing refers to the view."""
        with self._lock:
            self._collect()
            self._last = time.monotonic()
            part = self._take(-(-count // STEP) * STEP)
            if not self._keeper:
                keeper = threading.Thread(target=self._keep, name="moekit-memory", daemon=True)
                with suppress(RuntimeError):  # no more threads, or the interpreter ends
                    keeper.start()
                    self._keeper = keeper
        view = memoryview(self._segments[part.segment])[part.begin : part.end]

        def back(reference: weakref.ref[memoryview]) -> None:  # at any time, in any thread: it must not wait
            del self._watched[id(reference)]
            self._back.append(part)

        reference = weakref.ref(view, back)
        self._watched[id(reference)] = reference
        return view

    def give_back(self) -> None:
        """Gives what is free back to the system."""
        with self._lock:
            self._give_back()

    def _give_back(self) -> None:
        self._collect()
        with suppress(OSError):
            for part in self.free if hasattr(mmap, "MADV_DONTNEED") else ():
                self._segments[part.segment].madvise(mmap.MADV_DONTNEED, part.begin, part.end - part.begin)

    def _keep(self) -> None:
        while True:
            time.sleep(max(self._last + self.idle - time.monotonic(), 0.0) or self.idle)
            with self._lock:
                if time.monotonic() - self._last < self.idle:
                    continue
                self._give_back()
                if not self._watched:
                    self._keeper = None
                    return

    def _take(self, size: int) -> Part:
        for i, (segment, begin, end) in enumerate(self.free):
            if end - begin >= size:
                self.free[i : i + 1] = [Part(segment, begin + size, end)] if end - begin > size else []
                return Part(segment, begin, begin + size)
        self._segments.append(_segment(max(SEGMENT, size)))
        last = len(self._segments) - 1
        if size < SEGMENT:
            self.free.append(Part(last, size, SEGMENT))
        return Part(last, 0, size)

    def _collect(self) -> None:
        while self._back:
            part = self._back.popleft()
            i = bisect.bisect(self.free, part)
            if i < len(self.free) and self.free[i][:2] == (part.segment, part.end):
                part = part._replace(end=self.free.pop(i).end)
            if i and self.free[i - 1].segment == part.segment and self.free[i - 1].end == part.begin:
                i -= 1
                part = part._replace(begin=self.free.pop(i).begin)
            self.free.insert(i, part)


def _segment(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)  # private: a forked child's own
    segment = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            segment.madvise(mmap.MADV_HUGEPAGE)
    return segment


heap = Heap()


def _forked() -> None:
    """Gives a child a heap of its own: another thread of its parent may have been at work in the old one."""
    global heap
    heap = Heap()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns a tensor on the CPU whose numbers are not set, as `torch.empty`; in the heap from `LEAST` bytes on."""
    numbers = math.prod(shape)
    if numbers * dtype.itemsize < LEAST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        view = heap.lend(numbers * dtype.itemsize)
    except OSError:  # the system maps no more
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(view, dtype=dtype, count=numbers).view(shape).detach()  # no view to autograd
