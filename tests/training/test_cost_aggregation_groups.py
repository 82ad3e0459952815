"""Parameter groups of a model with cost aggregation are CAT-Seg's."""

from denseclip_hf.conversion.catseg import CATSEG_KEY_TABLE
from denseclip_hf.conversion.keys import rename
from denseclip_hf.training import parameter_groups
from helpers.catseg import catseg_case, catseg_model, parameters


def test_each_parameter_has_the_rate_and_decay_of_the_original():
    description, tensors = catseg_case("model")
    model = catseg_model()
    groups = parameter_groups(model, 1.0, 1e-4, image_encoder_lr_multiplier=0.01, text_encoder_lr_multiplier=0.01)
    ours = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(ours) == len(list(model.parameters()))
    last = len(model.clip.vision_model.encoder.layers) - 1
    theirs = {}
    for key, value in parameters(tensors).items():
        trained = description["trained"].get(key)
        for name in rename({key: value}, CATSEG_KEY_TABLE):
            if name == f"clip.vision_model.encoder.layers.{last}.self_attn.q_proj.weight":
                trained = None  # its gradient is always zero, for which devices in parallel would wait in vain
            theirs[name] = trained and (trained["lr_multiplier"], trained["weight_decay"])
    for name, parameter in model.named_parameters():
        rate, decay = ours[id(parameter)]
        assert ((rate, decay) if rate else None) == theirs[name], name
