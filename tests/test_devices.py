"""Precisions and devices by the names that every command takes."""

import pytest
import torch

from denseclip_hf.devices import DTYPES, LOADING_DTYPES, device_of, dtype_of


def test_every_dtype_option_takes_long_and_short_names():
    names = ["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
    assert [dtype_of(name) for name in names] == [torch.float32, torch.bfloat16, torch.float16] * 2
    assert list(DTYPES) == names and list(LOADING_DTYPES) == ["auto", *names]


def test_devices_by_name():
    assert device_of("cpu") == "cpu" and device_of("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ValueError, match=name) as caught:
        device_of(name)
    assert "\n" not in str(caught.value)
