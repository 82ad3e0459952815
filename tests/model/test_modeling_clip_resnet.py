import pytest
import torch
from transformers import AutoModel

from denseclip_hf import CLIPResNetModel, CLIPResNetVisionConfig, CLIPResNetVisionModel
from denseclip_hf.model.layers_denseclip import resize_position_grid
from helpers.models import tiny_config


@pytest.fixture
def vision():
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "depths": [1, 2, 1, 1], "num_attention_heads": 4}
    return CLIPResNetVisionModel(CLIPResNetVisionConfig(**sizes, image_size=64, projection_dim=12)).eval()


def test_shapes_at_any_size(vision):
    grid = (2, 3)
    with torch.no_grad():
        output = vision(torch.randn(2, 3, 75, 101), output_hidden_states=True)
    assert [c.shape[1] for c in output.feature_maps] == [16, 32, 64, 128] == vision.config.hidden_sizes
    assert output.feature_maps[-1].shape[-2:] == grid
    assert output.last_hidden_state.shape == (2, 1 + grid[0] * grid[1], 12)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert len(output.hidden_states) == 5 and output.hidden_states[0].shape[1] == 4


def test_position_grid_by_hand():
    """Two by two to one by one is the mean; the global position is never touched; the same size changes nothing."""
    positions = torch.tensor([[9.0], [1.0], [2.0], [3.0], [6.0]])
    assert resize_position_grid(positions, (1, 1)).tolist() == [[9.0], [3.0]]
    assert torch.equal(resize_position_grid(positions, (2, 2)), positions)


def test_contrastive_model_saves_loads_and_learns(tmp_path):
    model = CLIPResNetModel(tiny_config("resnet").clip_config)
    inputs = {"input_ids": torch.tensor([[98, 5, 99], [98, 6, 99]]), "pixel_values": torch.randn(2, 3, 64, 64)}
    model(**inputs, return_loss=True).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is CLIPResNetModel
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert features.shape == (2, 12)


def test_hidden_states_of_some_indices(vision):
    images = torch.randn(1, 3, 64, 64)
    every, some = (vision(images, output_hidden_states=choice).hidden_states for choice in (True, [0, -1]))
    assert [index for index, state in enumerate(some) if state is not None] == [0, 4]
    assert all(torch.equal(some[index], every[index]) for index in (0, 4))


def test_a_checkpoint_without_logit_scale_gets_clips_start():
    config = tiny_config("resnet").clip_config
    weights = CLIPResNetModel(config).state_dict()
    del weights["logit_scale"]
    model = CLIPResNetModel.from_pretrained(None, config=config, state_dict=weights)
    assert model.logit_scale.item() == pytest.approx(config.logit_scale_init_value)
