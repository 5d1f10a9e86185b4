"""The native library: compiled on first use, checked in a process of its own (`check`), kept by source and CPU."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno")
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",))
"""Tried in turn: not every compiler knows the machine by the same name. Without OpenMP one thread would have to beat
torch's many, so such a compiler (Apple's) is none."""

PATIENCE = 600
"""Seconds given to a step of the build. It takes a fraction of a minute, on a machine that is very busy several."""

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
SIGNATURES: dict[str, list[type]] = {
    "moekit_forward": [_INT, *[_LONG] * 3, *[_POINTER] * 2, _INT, _POINTER, _LONG, *[_POINTER] * 3],
    "moekit_fetch": [*[_LONG] * 3, _POINTER, _POINTER],
    "moekit_linear": [_INT, *[_LONG] * 3, _INT, _POINTER, _LONG, _POINTER],
    "moekit_linear_backward": [_INT, _INT, *[_LONG] * 3, _INT, *[_POINTER] * 2],
    "moekit_linear_gradient": [_INT, _INT, *[_LONG] * 3, _INT, _POINTER, _LONG, _POINTER],
    "moekit_backward_rows": [_INT, _INT, *[_LONG] * 3, *[_POINTER] * 2, _INT, _POINTER, _LONG, *[_POINTER] * 8],
    "moekit_weight_gradient": [
        *(_INT, _INT, _LONG, _POINTER, _POINTER, _INT),
        *(_POINTER, _LONG, _INT, _LONG) * 2,
        _POINTER,
    ],
    "moekit_attention_layer_bytes": [_INT, *[_POINTER] * 2],
    "moekit_attention_layer": [_INT, *[_POINTER] * 4],
    "moekit_attention_layer_backward": [_INT, *[_POINTER] * 6],
    "moekit_feed_forward_bytes": [_INT, *[_POINTER] * 2],
    "moekit_feed_forward": [_INT, *[_POINTER] * 4],
    "moekit_feed_forward_backward": [_INT, *[_POINTER] * 6],
    "moekit_block_bytes": [_INT, _INT, *[_POINTER] * 2],
    "moekit_blocks": [_INT, _INT, _LONG, *[_POINTER] * 6],
    "moekit_block_backward": [*[_INT] * 3, *[_POINTER] * 9],
    "moekit_largest": [*[_LONG] * 3, *[_POINTER] * 2, _INT],
    "moekit_route": [_POINTER, ctypes.c_float, _INT, *[_POINTER] * 9],
    "moekit_route_backward": [_POINTER, ctypes.c_float, _INT, *[_POINTER] * 9],
    "moekit_plan": [*[_LONG] * 2, *[_POINTER] * 4],
    "moekit_cross_entropy": [_INT, _LONG, _LONG, *[_POINTER] * 3, _INT, _INT],
    "moekit_swiglu": [_INT, _LONG, *[_POINTER] * 3, _INT],
    "moekit_swiglu_backward": [_INT, _LONG, *[_POINTER] * 5, _INT],
    "moekit_norm": [_INT, _INT, _LONG, _LONG, *[_POINTER] * 3, ctypes.c_float, *[_POINTER] * 4, _INT],
    "moekit_norm_backward": [_INT, _LONG, _LONG, *[_POINTER] * 9, _INT],
    "moekit_decode": [_POINTER, _LONG, *[_POINTER] * 3, _INT],
    "moekit_attention": [_INT, _POINTER, ctypes.c_float, _POINTER, _POINTER, _INT, *[_POINTER] * 5],
    "moekit_attention_backward": [_INT, _POINTER, ctypes.c_float, _POINTER, _INT, *[_POINTER] * 9],
    "moekit_merged": [_INT, _INT, _POINTER, _POINTER, _INT, _INT, *[_POINTER] * 3],
    "moekit_merged_gradient": [_INT, _INT, _POINTER, _POINTER, _INT, *[_POINTER] * 5],
    "moekit_rotate": [_INT, *[_LONG] * 4, _POINTER, *[_LONG] * 3, *[_POINTER] * 3, *[_INT] * 3],
    "moekit_routed_experts_bytes": [_INT, *[_POINTER] * 2],
    "moekit_routed_experts": [_INT, *[_POINTER] * 6],
    "moekit_routed_experts_backward": [_INT, _INT, *[_POINTER] * 10],
}


class Native(NamedTuple):
    """The loaded library, or why there is none."""

    library: ctypes.CDLL | None
    bfloat16: bool
    """Products of bfloat16 run on a unit of their own, not through float32."""
    amx: bool
    rounds: bool
    """Weights in codes are multiplied in 8-bit integers, activations rounded to such (decisions 29 and 30)."""
    lanes: int
    """Floats in a vector."""
    wide_amd: bool
    """Vectors of 16 floats are one step of a processor to which MKL gives vectors of 8 (`ops.product`)."""
    reason: str | None


@functools.cache
def native() -> Native:
    """Returns the library, compiling it first if need be (some seconds, once); a failure is told once and kept."""
    if os.environ.get("MOEKIT_NATIVE") == "0":
        return _none("MOEKIT_NATIVE is 0")
    named = os.environ.get("CXX")
    if named and not shutil.which(named):
        logger.warning("CXX is %r, which is no program here; another compiler is looked for", named)
    compiler = next(filter(None, map(shutil.which, (named or "c++", "g++", "clang++"))), None)
    if compiler is None or sys.platform == "win32":
        return _none(
            "no C++ compiler was found (g++ or clang++)" if sys.platform != "win32" else "Windows has none yet"
        )
    try:
        key = _key(compiler)
        if (path := _kept(key)) is None:
            logger.info("building the native kernels, once for this machine")
            path = _build(compiler, key)
        return load(path)
    except (OSError, subprocess.SubprocessError, BuildError) as error:
        return _none(str(error))


class BuildError(Exception):
    """The library could not be made, or its products are wrong."""


def library() -> ctypes.CDLL:
    """Returns the library where `native` has found one."""
    found = native().library
    assert found is not None
    return found


def folder() -> Path:
    """Returns where compiled kernels are kept: $MOEKIT_CACHE, else moekit in the user's cache."""
    if given := os.environ.get("MOEKIT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit"


def _kept(key: str) -> Path | None:
    """Returns the library that was built before, if it still is what its name says: a damaged one could end us."""
    found = (path for path in folder().absolute().glob(f"native-{key}-*.so") if path.stem.endswith(_digest(path)))
    return next(found, None)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def load(path: Path) -> Native:
    """Returns a compiled library, its functions typed."""
    library = ctypes.CDLL(str(path))
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes = types
        getattr(library, name).restype = None
    features = int(library.moekit_features())
    bfloat16, amx, rounds, wide_amd = (bool(features & 1 << bit) for bit in range(4))
    return Native(library, bfloat16, amx, rounds, features >> 8, wide_amd, None)


def compile_source(compiler: str, target: Path, *more: str) -> None:
    """Compiles the sources side by side and links them into `target`; BuildError has the compiler's first complaint."""
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [target.with_name(f"{target.stem}-{source.stem}.o") for source in sources]

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [compiler, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)

    def compiled(flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(run, *flags, "-c", "-o", *pair) for pair in zip(objects, sources, strict=True)]
        failed = [done for job in jobs if (done := job.result()).returncode]
        return failed[0] if failed else run(*flags, "-shared", "-o", target, *objects)

    for variant in VARIANTS:
        done = compiled((*FLAGS, *variant, *more))
        if done.returncode == 0:
            return
        # for want of memory or room: the next variant would be slower code, kept for good
        if "Killed" in done.stderr or "No space left" in done.stderr:
            break
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    raise BuildError(f"{compiler} failed: {lines[0]}")


def _build(compiler: str, key: str) -> Path:
    cache = folder().absolute()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        target = Path(work) / "native.so"
        compile_source(compiler, target)
        # another process: an instruction that the machine refuses must not end ours
        done = run_check(target)
        if done.returncode:
            last = (done.stderr.splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise BuildError(f"the compiled kernels failed their check: {last}")
        return target.replace(cache / f"native-{key}-{_digest(target)}.so")


def run_check(target: Path) -> subprocess.CompletedProcess[str]:
    """Checks a compiled library in another process, which ends with 0 if all is well."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); from moekit.ops.kernels.check import main; main(sys.argv[2])"
    command = [sys.executable, "-c", script, str(Path(__file__).parents[3]), str(target)]  # this moekit, no other
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)


def _key(compiler: str) -> str:
    command = [compiler, "--version"]
    version = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=True
    ).stdout
    sources = [path.read_text() for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join((*sources, version, *FLAGS, cpu())).encode()).hexdigest()[:16]


def cpu() -> str:
    """Returns what tells this CPU's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join(kept.get(name, "") for name in ("model name", "flags", "Features", "CPU part"))


def _none(reason: str) -> Native:
    logger.info("no native kernels: %s; torch's products are used", reason)
    return Native(None, False, False, False, 0, False, reason)


def matrices(count: int, kind: int, data: int, data_bytes: int, scales: int = 0, scales_bytes: int = 0) -> np.ndarray:
    """Returns the library's `Matrix` for each of `count` equal parts of what lies at `data`, (count, 3)."""
    numbers = np.arange(count)
    at, scales_at = data + numbers * (data_bytes // count), scales + numbers * (scales_bytes // count)
    return np.stack((at, scales_at, np.full(count, kind)), axis=1)
