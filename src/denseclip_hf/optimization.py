"""A model rewritten for inference: fewer operations, the same results to float rounding."""

import copy
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .model.modeling_clip_resnet import CLIPResNetConvLayer
from .model.modeling_denseclip import DenseCLIPForSemanticSegmentation


def optimize_for_inference(model: DenseCLIPForSemanticSegmentation) -> DenseCLIPForSemanticSegmentation:
    """
    A copy of `model` that does the same with less work; `model` stays as it is.

    - classes are frozen, unless the image prompts them: their embeddings are constants and the text tower is gone
    - batch norms are folded into the convolutions before them
    - of a ViT's pyramid, transposed convolutions and the neck's laterals behind them become one (no norm and no
      activation stands between them), so the first two of `hidden_states` have the neck's channels
    - weights of convolutions are channels-last, which their kernels want
    - of a ViT on a CPU, linear layers are computed as 1x1 convolutions, whose kernels are the faster ones there

    Logits, score maps and segmentations differ by float rounding. Wrap the result in `torch.compile` for more.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): of any data type, on the device where it is to run.

    Returns:
        [`DenseCLIPForSemanticSegmentation`] in eval mode, without gradients. It can be neither trained nor saved: keep
        the model it was made from.
    """
    optimized = copy.deepcopy(model).eval().requires_grad_(False)
    if optimized.config.use_text_guidance and optimized.config.prompting == "post_model":
        optimized.freeze_classes()
    for module in list(optimized.modules()):
        if isinstance(module, CLIPResNetConvLayer):
            module.convolution = fuse_conv_bn_eval(module.convolution, module.normalization)
            module.normalization = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, nn.Sequential):
            _fold_batch_norms(module)
    if optimized.pyramid is not None:
        _join_pyramid_and_laterals(optimized)
        if optimized.backbone is None and optimized.device.type == "cpu":
            _convolve_instead_of_multiplying(optimized.clip.vision_model.encoder)
    optimized.save_pretrained = _refuse("be saved")
    optimized.train = MethodType(_train, optimized)  # a bound method, so that deepcopy binds it to the copy
    return optimized.to(memory_format=torch.channels_last)


def _fold_batch_norms(layers: nn.Sequential) -> None:
    """Replace every convolution followed by a batch norm, keeping the places of all others."""
    for index in range(1, len(layers)):
        before, norm = layers[index - 1], layers[index]
        if isinstance(norm, nn.BatchNorm2d) and isinstance(before, (nn.Conv2d, nn.ConvTranspose2d)):
            transposed = isinstance(before, nn.ConvTranspose2d)
            layers[index - 1] = fuse_conv_bn_eval(before, norm, transpose=transposed)  # type: ignore[type-var]
            layers[index] = nn.Identity()


@torch.no_grad()
def _join_pyramid_and_laterals(model: Any) -> None:
    """One transposed convolution in place of each that only a lateral 1x1 convolution reads."""
    for level, step in enumerate((model.pyramid.up4, model.pyramid.up2)):
        if model.config.use_text_guidance and level == model.config.score_map_level:
            continue  # there the lateral also reads the score map
        up, lateral = step[-1], model.neck.lateral_convs[level]
        joined: Any = nn.ConvTranspose2d(up.in_channels, lateral.out_channels, 2, stride=2).to(up.weight)
        mixing = lateral.weight[:, :, 0, 0].double()  # out, between, 1, 1 -> out, between
        joined.weight.copy_(torch.einsum("ibhw,ob->iohw", up.weight.double(), mixing))
        joined.bias.copy_(mixing @ up.bias.double() + lateral.bias.double())
        step[-1], model.neck.lateral_convs[level] = joined.requires_grad_(False), nn.Identity()


class _LinearAsConvolution(nn.Conv2d):
    """A linear layer as a 1x1 convolution, for oneDNN's kernels: float32 products take MKL's slower ones."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear):
        kind: Any = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        super().__init__(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, **kind)
        self.weight.copy_(linear.weight[:, :, None, None])
        if self.bias is not None:
            self.bias.copy_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, N, C)` -> `(B, N, out_features)`."""
        x = x.transpose(1, 2)[:, :, None]  # B, C, 1, N: channels-last as it lies, nothing is copied
        return super().forward(x)[:, :, 0].transpose(1, 2)


def _convolve_instead_of_multiplying(encoder: nn.Module) -> None:
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _LinearAsConvolution(child).requires_grad_(False))


def _refuse(action: str):
    def refuse(*args, **kwargs):
        raise ValueError(f"a model optimized for inference cannot {action}: use the model it was made from.")

    return refuse


def _train(model: Any, mode: bool = True):
    if mode:
        _refuse("be trained")()
    return model


__all__ = ["optimize_for_inference"]
