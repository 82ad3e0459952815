"""Adapters: transformers' common configuration tests on our configurations."""

import json
import unittest

import pytest
from tests.test_configuration_common import ConfigTester

from helpers.models import tiny_config


VIT, RESNET = tiny_config("vit"), tiny_config("resnet")
CASES = {  # a config, and options that its class is to keep
    "denseclip_vit": (VIT, {"neck_hidden_size": 8, "inference_mode": "slide"}),
    "denseclip_resnet": (RESNET, {"clip_config": json.loads(RESNET.to_json_string())["clip_config"]}),
    "clip_resnet": (RESNET.clip_config, {"logit_scale_init_value": 2.0}),
    "clip_resnet_vision": (RESNET.clip_config.vision_config, {"embedding_size": 4, "depths": [1, 1, 1, 1]}),
}
CHECKS = [name for name in vars(ConfigTester) if name.startswith(("create_and_test_", "check_"))]


class Tester:
    def __init__(self, config):
        self.config = config

    def get_config(self):
        return self.config


class TestConfigurations:
    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("case", CASES)
    def test_config(self, case, check):
        config, options = CASES[case]
        parent = unittest.TestCase()
        parent.model_tester = Tester(config)
        common = ["hidden_size", "num_attention_heads", "image_size"] if "vision" in case else None
        tester = ConfigTester(parent, type(config), has_text_modality=False, common_properties=common, **options)
        getattr(tester, check)()
