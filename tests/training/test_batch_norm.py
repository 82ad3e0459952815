import pytest
import torch
from torch import distributed, nn

from denseclip_hf.training.batch_norm import AllReduceBatchNorm2d, frozen_batch_norms, synchronise_batch_norms


@pytest.mark.parametrize("mean", [1, 300])
def test_one_process_equals_torchs_batch_norm(tmp_path, mean):
    """Outputs, gradients and running statistics, through the collective path with a world of one."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        theirs, ours = nn.BatchNorm2d(4), AllReduceBatchNorm2d(4)
        with torch.no_grad():
            theirs.weight.uniform_(0.5, 2), theirs.bias.normal_()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(3, 4, 5, 6) * 2 + mean
        gradients = []
        for norm in (theirs, ours):
            inputs = x.clone().requires_grad_()
            norm(inputs).square().mul(torch.arange(6.0)).sum().backward()
            gradients.append((inputs.grad, norm.weight.grad, norm.bias.grad))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)
    finally:
        distributed.destroy_process_group()


def test_keys_and_values_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    synchronise_batch_norms(model, "cpu")
    assert isinstance(model[1][0], AllReduceBatchNorm2d) and model[1][0].eps == 1e-3
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    frozen = nn.Sequential(nn.BatchNorm2d(2).requires_grad_(False).eval())
    parameters, buffers = list(frozen.parameters()), list(frozen.buffers())
    synchronise_batch_norms(frozen, "cpu")
    assert not frozen[0].training and frozen_batch_norms(frozen) == [frozen[0]]
    assert all(new is old for new, old in zip(frozen.parameters(), parameters, strict=True))
    assert all(new is old for new, old in zip(frozen.buffers(), buffers, strict=True))
    synchronise_batch_norms(torch_model := nn.Sequential(nn.BatchNorm2d(2)), "cuda")
    assert isinstance(torch_model[0], nn.SyncBatchNorm)
