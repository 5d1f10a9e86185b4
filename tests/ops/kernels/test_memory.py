"""Memory of large results: used again, never lent twice, given back."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.ops.kernels.build import native
from moekit.ops.kernels.memory import LEAST, SEGMENT, STEP, Heap, Part, empty, heap

linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def resident() -> int:
    """Returns the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def lent(heap: Heap) -> int:
    """Returns the bytes of the heap that tensors lie in."""
    heap._collect()
    return sum(map(len, heap._segments)) - sum(part.end - part.begin for part in heap.free)


def test_a_large_result_lies_where_the_last_one_lay_and_a_small_one_is_torchs() -> None:
    before = lent(heap)
    first = empty((3, LEAST // 4), torch.float32)
    place = first.data_ptr()
    assert first.shape == (3, LEAST // 4)
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    assert lent(heap) == before + 3 * LEAST
    kept = first[1:]  # a view holds it as well as the tensor does
    del first
    second = empty((3, LEAST // 4), torch.float32)
    assert second.data_ptr() != place
    del kept, second
    assert lent(heap) == before
    assert empty((3 * LEAST // 2,), torch.bfloat16).data_ptr() == place
    assert lent(heap) == before
    small = empty((LEAST // 4 - 1,), torch.float32)
    assert small.numel() == LEAST // 4 - 1
    assert lent(heap) == before


def test_no_byte_is_lent_twice_and_all_come_back_as_one() -> None:
    own, chance = Heap(), random.Random(0)
    views: dict[int, memoryview] = {}
    for turn in range(3000):
        if views and chance.random() < 0.5:
            number = chance.choice(list(views))
            view = views.pop(number)
            assert view[0] == view[-1] == number % 256
            del view
        else:
            view = own.lend(chance.randrange(1, 9 * STEP))
            view[0] = view[-1] = turn % 256
            views[turn] = view
            del view
        with own._lock:
            own._collect()
        assert all(a.end < b.begin for a, b in pairwise(own.free) if a.segment == b.segment)
    places = sorted((torch.frombuffer(view, dtype=torch.uint8).data_ptr(), len(view)) for view in views.values())
    assert all(a + size <= b for (a, size), (b, _) in pairwise(places))
    views.clear()
    assert lent(own) == 0
    assert own.free == [Part(0, 0, SEGMENT)]


def test_more_than_a_segment_has_its_own() -> None:
    own = Heap()
    one, large = own.lend(5), own.lend(SEGMENT + 5)
    assert len(large) >= SEGMENT + 5
    assert len(own._segments) == 2
    assert len(one) == STEP
    del one, large
    assert lent(own) == 0
    assert own.free == [Part(0, 0, SEGMENT), Part(1, 0, SEGMENT + STEP)]


def test_threads_share_the_heap() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        chance, mine = random.Random(number), []
        for _ in range(300):
            mine.append(torch.full_like(empty((LEAST + chance.randrange(LEAST),), torch.uint8), number))
            made = empty((LEAST + chance.randrange(LEAST),), torch.uint8).fill_(number)
            mine = [*mine[-2:], made]
            wrong.extend(number for t in mine if int(t[0]) != number or int(t[-1]) != number)

    before = lent(heap)
    workers = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert lent(heap) == before


@linux
def test_what_is_free_is_given_back_and_what_is_not_stays() -> None:
    own = Heap()
    stays, goes = own.lend(STEP), own.lend(256 << 20)
    torch.frombuffer(stays, dtype=torch.uint8).fill_(7)
    torch.frombuffer(goes, dtype=torch.uint8).fill_(8)
    full = resident()
    own.give_back()
    assert resident() > full - (64 << 20), "it is still lent"
    del goes
    own.give_back()
    assert resident() < full - (192 << 20)
    assert set(stays) == {7}


@linux
def test_what_was_long_not_asked_for_is_given_back_by_itself() -> None:
    own = Heap(idle=1.0)
    for _ in range(2):  # anew when it was asked for again
        stays, goes = own.lend(STEP), own.lend(256 << 20)
        torch.frombuffer(goes, dtype=torch.uint8).fill_(1)
        full = resident()
        del goes
        assert resident() > full - (64 << 20), "too soon"
        deadline = time.monotonic() + 60.0
        while resident() > full - (192 << 20):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        late = own.lend(256 << 20)
        torch.frombuffer(late, dtype=torch.uint8).fill_(1)
        time.sleep(3.0)
        assert own._keeper, "something is lent"
        assert resident() > full - (64 << 20)
        del late, stays  # what comes back long after the last was lent
        while own._keeper:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert resident() < full - (192 << 20)


INTERRUPTED = """
import gc, os, signal, sys, threading, time
import torch
from moekit.ops.kernels.memory import empty
kept = [{} for _ in range(3_000_000)]  # a collection takes a while
empty((1 << 23,), torch.uint8).fill_(1)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
end = time.monotonic() + 60.0
try:
    while time.monotonic() < end:
        gc.collect()
except KeyboardInterrupt:
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself a Ctrl-C there")
def test_an_interrupt_is_not_lost_in_a_collection() -> None:
    """What a callback of the collector raises is not."""
    assert subprocess.run([sys.executable, "-c", INTERRUPTED], check=False).returncode == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_childs_writes_are_its_own() -> None:
    mine = heap.lend(LEAST)
    mine[0] = 1
    child = os.fork()
    if child == 0:
        mine[0] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert mine[0] == 1


def test_to_autograd_it_is_a_tensor_like_any_other() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.mul(x, 2, out=empty(x.shape, x.dtype))

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
            return torch.mul(dy, 2, out=empty(dy.shape, dy.dtype))

    x = torch.randn(3, LEAST // 4, requires_grad=True)
    y = Twice.apply(x)
    y[:, 5] = -1.0
    y += 1
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[:, 5].abs().max() == 0
    assert x.grad[:, 6:].eq(2).all()
    with torch.no_grad():
        z = Twice.apply(x)
    z.mul_(x)
    assert z.requires_grad


@pytest.mark.parametrize("count", [3, LEAST])
def test_it_is_on_the_cpu_whatever_the_default(count: int) -> None:
    with torch.device("meta"):
        assert empty((count,), torch.float32).device.type == "cpu"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_in_the_middle_of_a_call_has_a_heap_of_its_own() -> None:
    with heap._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(int(empty((LEAST,), torch.float32).numel() != LEAST))
    assert os.waitpid(child, 0)[1] == 0


STEPS = """
import resource, torch
from moekit.nn.experts import Experts
torch.manual_seed(0)
layer = Experts(20, 512, 512)
torch.nn.init.normal_(layer.gate_up_proj, std=0.02), torch.nn.init.normal_(layer.down_proj, std=0.02)
opt = torch.optim.SGD(layer.parameters(), lr=1e-3)
x, counts = torch.randn(160, 512), torch.full((20,), 8)
for step in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layer(x, counts).square().mean().backward()
    opt.step()
    opt.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@linux
@pytest.mark.skipif(native().library is None, reason="no native library")
def test_a_step_of_ones_own_loop_takes_no_new_pages() -> None:
    """Gradients of 40 and 20 MiB are 15,360 pages, of which 10,241 came anew in each step without the heap."""
    plain = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, env=plain)
    assert int(done.stdout) < 600


REFUSED = """
import resource
import torch
from moekit.ops.kernels.layer import feed_forward

torch.manual_seed(0)
x, gate, up, down = torch.randn(8192, 64), torch.randn(4096, 64), torch.randn(4096, 64), torch.randn(64, 4096)

def run():
    with torch.no_grad():
        return feed_forward(x, gate, up, down)

before = run()
limits = resource.getrlimit(resource.RLIMIT_AS)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (128 << 20), limits[1]))
try:
    run()
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, limits)
print(torch.equal(run(), before))
"""


@linux
@pytest.mark.skipif(native().library is None, reason="no native library")
def test_memory_that_is_refused_is_an_error_and_the_next_call_is_right() -> None:
    """What lies between the products of 8,192 tokens takes 384 MiB."""
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True)
    assert done.stdout == "the native kernels were refused memory (moekit_feed_forward)\nTrue\n"


FORKED = """
import ctypes, mmap, os, sys, time
import numpy as np
from moekit.ops.kernels.build import library, matrices

size, page = 64 << 10, mmap.PAGESIZE
ff = size // 4
here = open(sys.argv[1], "rb")
kept = np.memmap(sys.argv[1], dtype=np.uint8, mode="r")
mincore = ctypes.CDLL(None).mincore
mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

def there(begin):
    found = (ctypes.c_ubyte * (size // page))()
    assert mincore(kept.ctypes.data + begin, size, found) == 0
    return all(one & 1 for one in found)

def fetched(begin):
    os.posix_fadvise(here.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if there(begin):
        return "never left"
    table = np.concatenate([matrices(1, 0, kept.ctypes.data + begin, size)] * 3, axis=1)
    offsets = np.array([0, 1])
    library().moekit_fetch(1, 1, ff, offsets.ctypes.data, table.ctypes.data)
    end = time.monotonic() + 20.0
    while not there(begin) and time.monotonic() < end:
        time.sleep(0.01)
    return there(begin)

print(fetched(0), flush=True)
if os.fork() == 0:
    print(fetched(32 << 20), flush=True)
    os._exit(0)
os.wait()
"""


@linux
@pytest.mark.skipif(native().library is None, reason="no native library")
def test_weights_are_fetched_before_they_are_read_in_a_forked_child_too(tmp_path: Path) -> None:
    with (tmp_path / "weights").open("wb") as file:
        file.write(os.urandom(64 << 20))
        os.fsync(file.fileno())
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path / "weights")], capture_output=True, text=True, check=True
    )
    if "never left" in done.stdout:
        pytest.skip("this file system keeps what it is asked to drop")
    assert done.stdout == "True\nTrue\n"
