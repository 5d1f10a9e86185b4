"""The native library: it builds where a compiler is, is checked before use, and says why where it cannot be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moekit.ops import dispatch, reference
from moekit.ops.kernels import addresses, build, linear, native_experts
from moekit.ops.quantize import dequantize, quantize

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C++ compiler here")


@needs_compiler
def test_the_library_is_there_where_a_compiler_is() -> None:
    assert build.native().reason is None
    assert build.native().lanes in (4, 8, 16)


@needs_compiler
@pytest.mark.parametrize(
    "flags",
    [("-mno-avx512f",), ("-march=x86-64",), ("-DEMULATE_AMX",)],
    ids=["AVX2", "SSE2", "AMX in plain code"],
)
def test_other_machines_code_is_right_too(flags: tuple[str, ...], tmp_path: Path) -> None:
    """What this machine would not choose, compiled and checked here: the same sums in other instructions."""
    assert COMPILER is not None
    if sys.platform != "linux" or "x86" not in os.uname().machine:
        pytest.skip("these are x86's")
    build.compile_source([COMPILER], tmp_path / "other.so", *flags)
    build.run_check(tmp_path / "other.so").check_returncode()


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> build.Native:
    """The library with AMX in plain code, where there are the vectors beside it."""
    if COMPILER is None or not (build.native().bfloat16 and build.native().rounds):
        pytest.skip("AMX is compiled beside AVX-512 only")
    path = tmp_path_factory.mktemp("tiles") / "tiles.so"
    build.compile_source([COMPILER], path, "-DEMULATE_AMX")
    found = build.load(path)
    assert found.amx
    return found


def test_codes_in_tiles_and_in_vectors_give_the_same_bits(tiles: build.Native, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(30, 130).bfloat16(), torch.randn(70, 130)
    for kind in ("int8", "int4"):
        coded = quantize(weight, kind)  # type: ignore[arg-type]
        (vectors,) = linear.linears(x, (coded,))
        exact = reference.rounded(x.double()) @ dequantize(coded).double().T
        assert (vectors - exact).abs().max() < 4e-3 * exact.abs().max()  # half of a bfloat16's last place
        with monkeypatch.context() as patch:
            patch.setattr(linear, "library", lambda: tiles.library)
            assert torch.equal(linear.linears(x, (coded,))[0], vectors)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32], ids=["bfloat16", "mixed"])
@pytest.mark.parametrize(("dim", "ff"), [(70, 37), (64, 96), (1, 130)])
def test_experts_in_tiles_are_those_in_vectors(
    tiles: build.Native, dim: int, ff: int, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer as a model calls it, forward and back: rows that are gathered, experts of none, of one, of less than a
    tile, and of more rows than a weight's gradient sums at once."""
    counts = (2100, 1, 0, 33, 30)
    pairs = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    plan = dispatch.plan(pairs.view(-1, 2), len(counts))
    shapes = (sum(counts) // 2, dim), (len(counts), 2 * ff, dim), (len(counts), dim, ff)
    x, gate_up, down = (torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes)
    leaves = [x.bfloat16(), gate_up.to(kept), down.to(kept), torch.rand(len(x), 2), torch.randn(len(x), dim).bfloat16()]
    leaves, dy = [leaf.requires_grad_() for leaf in leaves], torch.randn(len(x), dim).bfloat16()

    def made() -> list[torch.Tensor]:
        x, gate_up, down, weights, plus = leaves
        y = native_experts.mixed_experts(x, weights, plan, gate_up, down, plus)
        with torch.no_grad():
            alone = native_experts.mixed_experts(x, weights, plan, gate_up, down, plus)
        return [y, alone, *torch.autograd.grad(y, leaves, dy)]

    vectors = made()
    with monkeypatch.context() as patch:
        patch.setattr(native_experts, "library", lambda: tiles.library)
        patch.setattr(addresses, "library", lambda: tiles.library)
        found = made()
    for one, other in zip(found, vectors, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= 1e-3 * other.float().norm()  # measured 2e-4


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "another library"])
def test_a_damaged_library_is_built_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded as it lies, one that is cut short ends the process."""
    assert build.native().reason is None
    kept = next(path for path in build.folder().glob("native-*.so") if path.stem.endswith(build._digest(path)))
    sound = kept.read_bytes()
    (tmp_path / kept.name).write_bytes(sound[: len(sound) // 2] if damage == "cut" else sound[::-1])
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path))
    built: list[str] = []

    def again(compiler: object, key: str) -> Path:
        built.append(key)
        whole = tmp_path / kept.name
        whole.write_bytes(sound)
        return whole

    monkeypatch.setattr(build, "_key", lambda compiler: kept.name.split("-")[1])
    monkeypatch.setattr(build, "_build", again)
    assert build.native.__wrapped__().reason is None
    assert build.native.__wrapped__().reason is None
    assert len(built) == 1


@needs_compiler
def test_a_compiler_that_writes_other_than_utf_8_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nprintf '\\374\\n'\nprintf 'error: \\374\\n' >&2\n[ \"$1\" = --version ]\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    found = build.native.__wrapped__()
    assert found.library is None
    assert found.reason == f"{compiler} failed: error: \N{REPLACEMENT CHARACTER}"


def _fresh(cache: Path, **more: str) -> "subprocess.Popen[str]":
    """Starts a process that asks for the library and prints why there is none."""
    script = "import logging; logging.basicConfig(level='INFO'); from moekit.ops.kernels.build import native; "
    command = [sys.executable, "-c", script + "print(native().reason)"]
    surroundings = os.environ | {"MOEKIT_CACHE": str(cache)} | more
    return subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _slow_compiler(folder: Path) -> Path:
    """Returns a compiler that counts its links and takes a sound library for what it links, after a while."""
    sound = next(path for path in build.folder().glob("native-*.so") if path.stem.endswith(build._digest(path)))
    compiler = folder / "compiler with a space"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'*-shared*) echo link >> {folder}/links; sleep 2; for last in "$@"; do '
        f'[ "$before" = -o ] && cp {sound} "$last"; before=$last; done;;\nesac\n'
    )
    compiler.chmod(0o755)
    return compiler


@needs_compiler
def test_of_two_processes_one_builds_and_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    assert build.native().reason is None
    cache, compiler = tmp_path / "cache", _slow_compiler(tmp_path)
    (cache / "build-of-a-killed-one").mkdir(parents=True)
    processes = [_fresh(cache, CXX=str(compiler)) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [out.strip() for out, _ in said] == ["None", "None"], said
    assert (tmp_path / "links").read_text() == "link\n"
    assert [path.suffix for path in sorted(cache.iterdir()) if path.name != "lock"] == [".so"]


@needs_compiler
def test_a_compiler_may_have_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env LC_ALL=C g++")
    assert build._compiler() == (shutil.which("env"), "LC_ALL=C", "g++")
    monkeypatch.setenv("CXX", str(_slow_compiler(tmp_path)))
    assert build._compiler() == (str(tmp_path / "compiler with a space"),)
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "env no-such-compiler")
    assert "no-such-compiler --version failed: " in str(build.native.__wrapped__().reason)


@needs_compiler
def test_a_cache_that_cannot_be_used_is_named_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(build, "compile_source", lambda *of: pytest.fail("it compiled"))
    assert "MOEKIT_CACHE may name another directory" in str(build.native.__wrapped__().reason)


@needs_compiler
def test_the_cache_keeps_the_newest_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.native().reason is None
    monkeypatch.setenv("CXX", str(_slow_compiler(tmp_path)))
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    old = [tmp_path / "cache" / f"native-{i:016x}-{i:016x}.so" for i in range(build.KEPT)]
    for i, path in enumerate(old):
        path.touch()
        os.utime(path, (i, i))
    assert build.native.__wrapped__().reason is None
    assert [path.exists() for path in old] == [False, *[True] * (build.KEPT - 1)]


@needs_compiler
def test_wrong_products_are_found_before_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.SOURCES, tmp_path / "cpu")
    products = (tmp_path / "cpu" / "products.h").read_text()
    broken = products.replace("const float* at = TURNED ? a + k * ks : a + k;", "const float* at = a;")
    assert broken != products
    (tmp_path / "cpu" / "products.h").write_text(broken)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "cpu")
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    found = build.native.__wrapped__()
    assert found.library is None
    assert found.reason is not None
    assert "failed their check: " in found.reason
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"MOEKIT_NATIVE": "0"}, "MOEKIT_NATIVE is 0"),
        ({"MOEKIT_NATIVE": "False"}, "MOEKIT_NATIVE is False"),
        ({"PATH": "", "CXX": "no-such-compiler"}, "no C++ compiler"),
    ],
)
def test_without_it_torch_takes_over_and_one_line_says_why(setting: dict[str, str], reason: str) -> None:
    script = (
        "import logging, torch; logging.basicConfig(level=logging.INFO)\n"
        "from moekit.ops.experts import choose\n"
        "x, g, d = torch.ones(2, 8), torch.ones(1, 8, 8), torch.ones(1, 8, 4)\n"
        "print(choose('auto', x, g, d), choose('auto', x, g, d))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **setting}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "torch torch\n"
    assert done.stderr.count("no native kernels") == 1
    assert reason in done.stderr


@needs_compiler
def test_a_second_process_builds_nothing(tmp_path: Path) -> None:
    script = (
        "import logging; logging.basicConfig(level=logging.INFO)\nfrom moekit.ops.kernels.build import native; native()"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "MOEKIT_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        for _ in range(2)
    ]
    assert "building the native kernels" in told[0]
    assert told[1] == ""
