import torch
from torch import nn

from denseclip_hf.model.decoder_denseclip import FPNNeck, SemanticFPNHead
from denseclip_hf.model.layers_denseclip import resize_bilinear


def test_neck_adds_coarser_levels_by_nearest_neighbor():
    neck = FPNNeck([1, 1, 1, 1], 1)
    for convolution in [*neck.lateral_convs, *neck.output_convs]:
        nn.init.zeros_(convolution.bias)
        nn.init.dirac_(convolution.weight)
    features = [torch.zeros(1, 1, size, size) for size in (7, 4, 2, 1)]
    features[1][0, 0, 0, 0], features[3][0, 0, 0, 0] = 1.0, 10.0
    p2, p3, p4, p5 = neck(features)
    assert p5.item() == 10 and p4.unique().tolist() == [10.0] and p3[0, 0, 0, 0] == 11 and p3[0, 0, 1, 1] == 10
    # seven rows take their value from row floor(i * 4 / 7) of four
    assert p2[0, 0, :, 0].tolist() == [11.0, 11.0, 10.0, 10.0, 10.0, 10.0, 10.0]


def test_head_upsamples_between_convolutions_and_once_at_the_end():
    head = SemanticFPNHead(4, 6, 3, 0.1, 1e-5)
    convolutions = [sum(isinstance(layer, nn.Conv2d) for layer in level) for level in head.scale_heads]
    upsamplings = [sum(isinstance(layer, nn.Upsample) for layer in level) for level in head.scale_heads]
    assert (convolutions, upsamplings) == ([1, 1, 2, 3], [0, 0, 1, 2])
    levels = [torch.randn(2, 4, size, size) for size in (15, 7, 3, 1)]
    assert head(levels).shape == (2, 3, 15, 15)


def test_resizing_to_the_same_size_is_free():
    x = torch.randn(1, 2, 3, 4)
    assert resize_bilinear(x, (3, 4)) is x
    assert resize_bilinear(x, (6, 8)).shape == (1, 2, 6, 8)
