"""Tiny checkpoints as their authors publish them: a released DenseCLIP, and CLIPs in every format."""

import json
from collections import OrderedDict
from functools import cache

import torch
from safetensors.torch import save_file

from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.clip_reference import reference_clip
from helpers.golden import golden_case


NAMES = ["sky", "road", "car", "tree ", "sea"]
PALETTE = [[0, 0, 255], [9, 9, 9], [255, 0, 0], [0, 255, 0], [0, 0, 128]]
IMAGE = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(3))


@cache
def tokenizer():
    """Of both kinds of checkpoints."""
    return learn_tokenizer([*NAMES, "a photo of a boat", "a photo of a cat"], vocab_size=560)


def release(name="seg_vit", options=None, **meta):
    """A checkpoint laid out as mmcv saves it, for the vocabulary of the test tokenizer."""
    case, tensors = golden_case(name)
    weights = {k.removeprefix("state_dict/"): v for k, v in tensors.items() if k.startswith("state_dict/")}
    width = weights["text_encoder.token_embedding.weight"].shape[1]
    generator = torch.Generator().manual_seed(0)
    weights["text_encoder.token_embedding.weight"] = torch.randn(len(tokenizer()), width, generator=generator)
    kwargs = json.loads(json.dumps(case["model_cfg"]))
    kwargs["text_encoder"]["vocab_size"] = len(tokenizer())
    kwargs |= options or {}
    config = f"norm_cfg = dict(type='SyncBN')\nmodel = {_as_mmcv(kwargs)}\noptimizer = dict(lr=1e-4)\n"
    meta = {
        "env_info": "sys.platform: linux\nMMCV: 1.3.17", "mmseg_version": "0.19.0+5eda47f", "mmcv_version": "1.3.17",
        "time": "Wed Nov 24 12:00:00 2021", "config": config, "CLASSES": tuple(NAMES), "PALETTE": PALETTE,
        "seed": None, "exp_name": f"{name}.py", "hook_msgs": {}, "epoch": 64, "iter": 80000, **meta,
    }  # fmt: skip
    state = OrderedDict(weights)
    state._metadata = OrderedDict()
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {"meta": meta, "state_dict": state, "optimizer": optimizer}


def _as_mmcv(value):
    """`value` as mmcv writes configs: mappings as calls of `dict`."""
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key}={_as_mmcv(part)}' for key, part in value.items())})"
    return repr(value)


def save(folder, content, name="released.pth", **options):
    path = folder / name
    torch.save(content, path, **options)
    return path


def _archive(clip, path):
    tokens = torch.tensor(tokenizer()("a cat")["input_ids"])
    for name in ("input_resolution", "context_length", "vocab_size"):
        clip.register_buffer(name, torch.tensor(64))
    torch.jit.trace(clip, (IMAGE, tokens), check_trace=False).save(str(path))


FORMATS = {
    "torchscript": _archive,
    "state dict": lambda clip, path: torch.save(clip.state_dict(), path),
    "training checkpoint": lambda clip, path: torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}, "optimizer": {}}, path
    ),
    "safetensors": lambda clip, path: save_file(clip.state_dict(), path),
}


def write_clip(kind, format, folder):
    """A reference CLIP with its "vit" or "resnet", and the file it was written to."""
    clip = reference_clip(kind, len(tokenizer()))
    path = folder / ("clip.safetensors" if format == "safetensors" else "clip.pt")
    FORMATS[format](clip, path)
    return clip, path
