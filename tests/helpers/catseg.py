"""Golden cases of CAT-Seg: what its authors' program computes, and our decoder with the same weights."""

import torch

from denseclip_hf import DenseCLIPConfig, DenseCLIPForSemanticSegmentation
from denseclip_hf.conversion.catseg import aggregator_key_table, config_from_catseg, convert_catseg_state_dict
from denseclip_hf.conversion.keys import rename
from denseclip_hf.model.cost_aggregation_denseclip import CostAggregationHead
from helpers.golden import fixture


def catseg_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Description and tensors of `catseg_{name}`."""
    return fixture(f"catseg_{name}")


def compare(actual: torch.Tensor, name: str, fixture: str) -> None:
    """Fail unless `actual` is the tensor `name` of a fixture, within the tolerance its description gives."""
    description, tensors = catseg_case(fixture)
    atol = description["tensors"][name]["atol"]
    torch.testing.assert_close(
        actual.detach(), tensors[name].to(actual.dtype), rtol=0, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def parameters(tensors: dict[str, torch.Tensor], prefix: str = "state_dict/") -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def aggregator(config: dict, weights: dict[str, torch.Tensor]) -> CostAggregationHead:
    """The decoder of a golden config, in training mode; what upsamples the skips is no part of these cases."""
    head = CostAggregationHead(
        embedding_size=config["text_guidance_dim"],
        skip_size=1,
        hidden_size=config["hidden_dim"],
        num_layers=config["num_layers"],
        num_heads=config["nheads"],
        window_size=config["window_size"],
        max_classes=config["pad_len"],
        pooling_size=config["pooling_size"],
        image_guidance_size=config["appearance_guidance_proj_dim"],
        text_guidance_size=config["text_guidance_proj_dim"],
        skip_sizes=config["decoder_guidance_dims"],
        skip_projection_sizes=config["decoder_guidance_proj_dims"],
        upsampling_sizes=config["decoder_dims"],
        num_templates=config["prompt_channel"],
    )
    if not config["pad_len"]:
        weights = {key: value for key, value in weights.items() if "padding" not in key}
    others = {key: value for key, value in head.state_dict().items() if key.startswith("skip_upsamplers")}
    head.load_state_dict(rename(weights, aggregator_key_table("", "")) | others, strict=True)
    return head


def catseg_model(**options) -> DenseCLIPForSemanticSegmentation:
    """Our whole model with the weights of the golden one and its training classes."""
    description, tensors = catseg_case("model")
    sizes = description["sizes"]
    weights = parameters(tensors)
    id2label = dict(enumerate(description["train_classes"]))
    config = config_from_catseg(weights, id2label, token_ids("train"), out_indices=sizes["hooks"]).to_dict()
    # What no weight shows, beside the published sizes.
    config["clip_config"]["vision_config"]["num_attention_heads"] = sizes["width"] // sizes["vhead"]
    config["clip_config"]["text_config"]["num_attention_heads"] = sizes["theads"]
    pooling = {"pooling_size": sizes["pool"], "inference_pooling_size": sizes["pool"]}
    config["aggregator"] |= {"num_heads": sizes["heads"], **pooling, **options.pop("aggregator", {})}
    model = DenseCLIPForSemanticSegmentation(DenseCLIPConfig.from_dict({**config, **options}))
    model.load_state_dict(convert_catseg_state_dict(weights, model.config), strict=True)
    return model


def token_ids(split: str) -> list[list[int]]:
    """Ids of the class names in their sentence, up to the end token, which has the largest id."""
    rows = catseg_case("model")[1][f"in/{split}/tokens"].tolist()
    return [row[: row.index(max(row)) + 1] for row in rows]
