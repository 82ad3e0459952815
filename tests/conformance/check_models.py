"""Adapters: transformers' common model tests on our models, the segmenter with each image tower."""

import unittest

import torch
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin

from denseclip_hf import CLIPResNetModel, CLIPResNetVisionModel, DenseCLIPForSemanticSegmentation
from helpers.families import segmenter_of
from helpers.models import tiny_config


class ImageModelTester:
    """What the common tests ask of a model tester: a tiny config of our own tests, and two images."""

    batch_size = 2
    is_training = True
    num_hidden_layers = 2  # of the text tower

    def __init__(self, config):
        self.config = config

    def get_config(self):
        return self.config.__class__.from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": floats_tensor([self.batch_size, 3, 64, 64])}


class CommonTests(ModelTesterMixin, TrainingTesterMixin):
    has_attentions = False  # no attention weights are returned
    test_can_init_all_missing_weights_before_2023 = True  # or our files, without a year, would count as old
    test_resize_embeddings = False  # the classes are given, there are no tokens to add
    model_tester = None


class SegmenterTests(CommonTests):
    all_model_classes = (DenseCLIPForSemanticSegmentation,)
    options: dict = {}
    kind = "vit"

    def config(self):
        return tiny_config(self.kind, **self.options)

    def setUp(self):
        self.model_tester = ImageModelTester(self.config())
        # hidden states: four maps, the first of which is at stride 4
        self.model_tester.expected_num_hidden_layers = 4
        self.model_tester.seq_length = self.model_tester.hidden_size = 64 // 4


class DenseCLIPViTTest(SegmenterTests, unittest.TestCase):
    pass


class DenseCLIPViTBaselineTest(SegmenterTests, unittest.TestCase):
    options = {"use_text_guidance": False}


class DenseCLIPResNetTest(SegmenterTests, unittest.TestCase):
    kind = "resnet"


class DenseCLIPResNetBaselineTest(SegmenterTests, unittest.TestCase):
    kind = "resnet"
    options = {"use_text_guidance": False}


class FamilyTests(SegmenterTests):
    family = ""

    def config(self):
        return segmenter_of(self.family)[0].config


class DenseCLIPMetaClip2Test(FamilyTests, unittest.TestCase):
    family = "MetaClip2"


class DenseCLIPSiglipTest(FamilyTests, unittest.TestCase):
    family = "Siglip"


class DenseCLIPTipsv2Test(FamilyTests, unittest.TestCase):
    family = "Tipsv2"

    @unittest.skip("it writes options of language models into the config, which refuses options it does not have")
    def test_reverse_loading_mapping(self):
        """Not listed as inapplicable: a part of it fails, which no mark can expect."""


class DenseCLIPBackboneTest(SegmenterTests, unittest.TestCase):
    options = {
        "backbone_config": {
            "model_type": "convnext", "hidden_sizes": [4, 8, 16, 32], "depths": [1, 1, 1, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "backbone_image_size": 64,
    }  # fmt: skip


class CLIPResNetVisionModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (CLIPResNetVisionModel,)

    def setUp(self):
        self.model_tester = ImageModelTester(tiny_config("resnet").clip_config.vision_config)
        self.model_tester.is_training = False  # it has no loss of its own
        # hidden states: the stem's and four stages', the first two of which are at stride 4
        self.model_tester.expected_num_hidden_layers = 5
        self.model_tester.seq_length = self.model_tester.hidden_size = 64 // 4


class CLIPResNetModelTester(ImageModelTester):
    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        input_ids = ids_tensor([self.batch_size, 7], config.text_config.vocab_size)
        attention_mask = torch.ones_like(input_ids)
        return config, {"input_ids": input_ids, "attention_mask": attention_mask, **inputs, "return_loss": True}


class CLIPResNetModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (CLIPResNetModel,)
    _is_composite = True
    skip_test_image_features_output_shape = True  # the pooling's tokens lie in the shared space, not in `hidden_size`

    def setUp(self):
        config = tiny_config("resnet").clip_config
        self.model_tester = CLIPResNetModelTester(config)
        self.model_tester.vision_model_tester = ImageModelTester(config.vision_config)
        self.model_tester.vision_model_tester.expected_num_hidden_layers = 5  # hidden states
