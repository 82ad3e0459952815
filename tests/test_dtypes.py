import pytest
import torch

from denseclip_hf.dtypes import DTYPES
from denseclip_hf.inference import LOADING_DTYPES


@pytest.mark.parametrize("table", [DTYPES, LOADING_DTYPES])
def test_every_dtype_option_takes_long_and_short_names(table):
    names = ("float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
    dtypes = [torch.float32, torch.bfloat16, torch.float16] * 2
    assert [table[name] for name in names] == dtypes
