"""The native library: compiled on first use, checked in a process of its own (`check`), kept by source and CPU."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno")
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",))
"""Tried in turn: not every compiler knows the machine by the same name. Without OpenMP one thread would have to beat
torch's many, so such a compiler (Apple's) is none."""

PATIENCE = 600
"""Seconds given to a step of the build. It takes a fraction of a minute, on a machine that is very busy several."""

KEPT = 16
"""Libraries that stay in the cache: a home may be shared by machines, and each source has its own for each."""

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
    if (wanted := os.environ.get("MOEKIT_NATIVE", "")).lower() in ("0", "false", "no", "off"):
        return _none(f"MOEKIT_NATIVE is {wanted}")
    if sys.platform == "win32":
        return _none("Windows has none yet")
    if not (compiler := _compiler()):
        return _none("no C++ compiler was found (g++ or clang++)")
    try:
        key = _key(compiler)
        return load(_kept(key) or _build(compiler, key))
    except (OSError, subprocess.SubprocessError, BuildError) as error:
        return _none(str(error))


class BuildError(Exception):
    """The library could not be made, or its products are wrong."""


def _compiler() -> tuple[str, ...]:
    """Returns $CXX, a program and perhaps arguments ("ccache g++"), else the first compiler found, or nothing."""
    if named := os.environ.get("CXX"):
        for words in ((named,), shlex.split(named)):
            if words and (found := shutil.which(words[0])):
                return (found, *words[1:])
        logger.warning("CXX is %r, which is no program here; another compiler is looked for", named)
    return tuple(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))[:1]


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
        function = getattr(library, name)
        function.argtypes, function.errcheck = types, _accepted
    features = int(library.moekit_features())
    bfloat16, amx, rounds, wide_amd = (bool(features & 1 << bit) for bit in range(4))
    return Native(library, bfloat16, amx, rounds, features >> 8, wide_amd, None)


def _accepted(refused: int, function: Any, arguments: tuple[object, ...]) -> None:
    """Raises MemoryError where the system refused a function of the library memory."""
    if refused:
        raise MemoryError(f"the native kernels were refused memory ({function.__name__})")


def compile_source(compiler: Sequence[str], target: Path, *more: str) -> None:
    """Compiles the sources side by side and links them into `target`; BuildError has the compiler's first complaint."""
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [target.with_name(f"{target.stem}-{source.stem}.o") for source in sources]

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return _run(*compiler, *arguments)

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
    raise BuildError(_complaint(compiler, done))


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)


def _complaint(compiler: Sequence[str], done: subprocess.CompletedProcess[str]) -> str:
    """Returns the first line of what a failed compiler says that has an error in it, else the first."""
    said = done.stderr.splitlines()
    first = next((line for line in said if "error" in line), said[0] if said else f"it ended with {done.returncode}")
    return f"{shlex.join(compiler)} failed: {first}"


def _build(compiler: Sequence[str], key: str) -> Path:
    """Returns the compiled library in the cache. Of several processes one builds, and the others wait for it."""
    cache = folder().absolute()
    lock = FileLock(cache / "lock", timeout=PATIENCE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BuildError(f"another process holds {lock.lock_file} for {PATIENCE} seconds") from None
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        raise BuildError(f"the cache cannot be used ({error}); MOEKIT_CACHE may name another directory") from None
    try:
        if path := _kept(key):
            return path
        logger.info("building the native kernels, once for this machine")
        for left in cache.glob("build-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as work:
            target = Path(work) / "native.so"
            compile_source(compiler, target)
            # another process: an instruction that the machine refuses must not end ours
            done = run_check(target)
            if done.returncode:
                last = (done.stderr.splitlines() or [f"it ended with {done.returncode}"])[-1]
                raise BuildError(f"the compiled kernels failed their check: {last}")
            made = target.replace(cache / f"native-{key}-{_digest(target)}.so")
        for old in sorted(cache.glob("native-*.so"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
        return made
    finally:
        lock.release()


def run_check(target: Path) -> subprocess.CompletedProcess[str]:
    """Checks a compiled library in another process, which ends with 0 if all is well."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); from moekit.ops.kernels.check import main; main(sys.argv[2])"
    return _run(sys.executable, "-c", script, Path(__file__).parents[3], target)  # this moekit, no other


def _key(compiler: Sequence[str]) -> str:
    version = _run(*compiler, "--version")
    if version.returncode:
        raise BuildError(_complaint([*compiler, "--version"], version))
    sources = [path.read_text() for path in sorted(SOURCES.iterdir())]
    said = (*sources, version.stdout, *compiler[1:], *FLAGS, cpu())
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]


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
