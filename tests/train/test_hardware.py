"""Which device and precision a setting means."""

import subprocess
import sys

import pytest
import torch

from moekit.errors import ConfigError, UnsupportedError
from moekit.train import hardware


def test_auto_is_cuda_where_there_is_one() -> None:
    assert hardware.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert hardware.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "mps", "meta", "cuda:x", "cpu:"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="choose auto, cpu, cuda or cuda:N"):
        hardware.choose_device(name)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"device is 'cuda:99' but"):
        hardware.choose_device("cuda:99")


def test_precision_is_what_was_asked_for_or_what_the_hardware_has() -> None:
    assert hardware.choose("cpu", "bfloat16").autocast
    assert not hardware.choose("cpu", "float32").autocast
    assert hardware.choose("cpu", "auto").autocast == hardware.has_bfloat16(torch.device("cpu"))


def test_measuring_the_matmul_draws_nothing_from_the_random_stream(device: torch.device) -> None:
    before = torch.get_rng_state()
    assert hardware.matmul_flops(hardware.choose(str(device), "float32"), size=64) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_peak_memory_covers_what_was_allocated(device: torch.device) -> None:
    block = torch.ones(1 << 20, device=device)
    assert hardware.peak_memory(device) >= block.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts it so")
def test_peak_memory_of_a_child_is_not_its_parents() -> None:
    block = torch.ones(1 << 29, dtype=torch.uint8)  # 512 MiB in this process
    code = "import torch; from moekit.train import hardware; print(hardware.peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < hardware.peak_memory(torch.device("cpu")) - block.nbytes // 2
