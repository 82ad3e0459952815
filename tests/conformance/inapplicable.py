"""Tests of transformers that cannot apply to our classes, and why: patterns of `Class::test`, and the reason."""

from transformers.utils import is_torchvision_available


INAPPLICABLE = {
    "*::test_config?denseclip_resnet-*_composite?": "reads our file as CLIPConfig; here it holds a CLIPResNetConfig",
    "*::test_training_overfit": "knows language models only: it raises for images, and asks for one vocabulary size",
    "DenseCLIP*::test_model_get_set_embeddings": "asks for token embeddings; an image model's input is a convolution",
    "CLIPResNetVisionModelTest::test_model_get_set_embeddings": "as for DenseCLIP",
    "CLIPResNetModelTest::test_model_get_set_embeddings": "a CLIP has two inputs; CLIPModel answers neither",
    "CLIPResNetModelTest::test_hidden_states_output": "CLIP's output nests its towers' and has none of its own",
    "CLIPResNetModelTest::test_retain_grad_hidden_states_attentions": "as above",
    "DenseCLIP*::test_get_image_features_hidden_states": "asks for a `vision_config`; ours is inside `clip_config`",
    "DenseCLIP*::test_get_image_features_output_?": "as above",
    "DenseCLIP*::test_get_text_features_hidden_states": "asks for a `text_config`; ours is inside `clip_config`",
    "DenseCLIP*::test_get_text_features_output_?": "as above",
    "DenseCLIPTipsv2Test::test_model_weights_reload_no_missing_tied_weights": (
        "Tipsv2Model may lack its temperature in files, which here is a buffer that is never saved"
    ),
    "DenseCLIPSiglipTest::test_init_weights_can_init_buffers": (
        "SiglipModel is built with random scale and bias, its initialization makes them 0; nothing reads them here"
    ),
    "DenseCLIP*::test_correct_missing_keys": "loads a bare CLIP, which has no class names: we point to `from_clip`",
}
if not is_torchvision_available():
    INAPPLICABLE["*::test_new_models_require_torchvision_backend"] = "torchvision is optional and not installed here"
