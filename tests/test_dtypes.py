import pytest
import torch

from denseclip_hf import conversion_clip, measurement


@pytest.mark.parametrize("module", [conversion_clip, measurement])
def test_every_dtype_option_takes_long_and_short_names(module):
    names = ("float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
    dtypes = [torch.float32, torch.bfloat16, torch.float16] * 2
    assert [module.DTYPES[name] for name in names] == dtypes
