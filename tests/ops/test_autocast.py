"""One cast where autocast is on; none where it is off or unknown."""

import torch

from moekit.ops.autocast import autocast_off, cast_once


def test_cast_once_follows_autocast(device: torch.device) -> None:
    x = torch.ones(2, 3, device=device)
    assert cast_once(x) is x
    with torch.autocast(device.type, torch.bfloat16):
        assert cast_once(x).dtype == torch.bfloat16
        with autocast_off(x):
            assert cast_once(x) is x


def test_the_meta_device_is_left_alone() -> None:
    x = torch.ones(2, 3, device="meta")
    with autocast_off(x):
        assert cast_once(x) is x
