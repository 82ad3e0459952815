"""The precisions of weights, by the names that options take: transformers' own, and short ones."""

import torch


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


__all__ = ["DTYPES"]
