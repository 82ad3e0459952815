"""The whole model with cost aggregation computes what CAT-Seg's does, in training and with sliding windows."""

import re

import pytest
import torch
from torch.nn import functional as F

from denseclip_hf.conversion.catseg import CATSEG_KEY_TABLE
from denseclip_hf.conversion.keys import rename
from denseclip_hf.model.cost_aggregation_denseclip import LEFT_OUT
from denseclip_hf.model.layers_denseclip import resize_bilinear, resize_position_grid
from helpers.catseg import catseg_case, catseg_model, compare, parameters, token_ids


INFERENCE = catseg_case("inference")[0]["cases"]


def normalized(image: torch.Tensor) -> torch.Tensor:
    description, _ = catseg_case("model")
    mean, std = (torch.tensor(description[f"pixel_{name}"])[:, None, None] for name in ("mean", "std"))
    return (image.float() - mean) / std


def batch(split: str) -> torch.Tensor:
    """The images of a split as CAT-Seg batches them: padded with zeros to a multiple of its divisor."""
    description, tensors = catseg_case("model")
    names = [name for name in tensors if re.fullmatch(rf"in/{split}/image_\d+", name)]
    images = [normalized(tensors[name]) for name in sorted(names)]
    divisor = description["sizes"]["div"]
    height, width = (-(-max(image.shape[axis] for image in images) // divisor) * divisor for axis in (1, 2))
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])


def kept_steps(model) -> dict[str, list[torch.Tensor]]:
    """What goes through the model's parts from now on, by the names of the fixtures."""
    steps: dict[str, list[torch.Tensor]] = {}
    vision, text, head = model.clip.vision_model, model.clip.text_model, model.decode_head

    def keep(name: str, module: torch.nn.Module, entering: bool = False) -> None:
        def hook(module, args, output):
            value = args[0] if entering else output
            steps.setdefault(name, []).append(value[0] if isinstance(value, tuple) else value)

        module.register_forward_hook(hook)

    keep("clip_image", vision.embeddings, entering=True)
    keep("visual.tokens", vision.embeddings)
    for index, layer in enumerate(vision.encoder.layers[:-1]):
        keep(f"visual.block_{index}", layer)
    keep("visual.dense_residual", vision.encoder.layers[-1].layer_norm2, entering=True)
    keep("visual.dense_out", vision.post_layernorm, entering=True)
    keep("clip_features", model.clip.visual_projection)
    for index, layer in enumerate(text.encoder.layers):
        keep(f"text.block_{index}", layer)
    for name, upsampler in zip(("res4", "res5"), head.skip_upsamplers, strict=True):
        keep(name, upsampler)
    for index, layer in enumerate(head.layers):
        keep(f"layers.{index}.out", layer)
    keep("logits", head)
    return steps


def compare_steps(model, steps: dict[str, list[torch.Tensor]], outputs, split: str, fixture: str) -> None:
    tensors = catseg_case(fixture)[1]
    for name in parameters(tensors, f"step/{split}/"):
        full = f"step/{split}/{name}"
        if name == "text_feats":
            actual = F.normalize(outputs.text_embeds[0], dim=-1)[:, None]
        elif name == "corr":
            actual = outputs.score_maps[:, None]
        elif name.startswith("text.block"):  # ours holds several prompts in a row, the tokens of each in order
            layout = model.prompts.layout(model.device)
            theirs, ours = torch.zeros_like(tensors[full]), steps[name][0]
            own = layout.owners >= 0
            theirs[:] = tensors[full]
            theirs[layout.position_ids[own], layout.owners[own]] = ours[own].detach()
            actual = theirs
        else:
            actual = torch.cat(steps[name])
            if name.startswith("layers"):
                actual = actual.permute(0, 4, 1, 2, 3)
            elif re.match(r"visual\.(block|dense_residual)", name):
                actual = actual.transpose(0, 1)
        compare(actual, full, fixture)


def test_training_steps_loss_and_gradients():
    model = catseg_model(inference_mode="whole").train()
    _, tensors = catseg_case("model")
    labels = [tensors[name] for name in sorted(tensors) if re.fullmatch(r"in/train/sem_seg_\d+", name)]
    steps = kept_steps(model)
    outputs = model(batch("train"), labels=torch.stack(labels).long())
    compare_steps(model, steps, outputs, "train", "model_train")
    compare(resize_bilinear(outputs.logits, labels[0].shape), "out/train/logits", "model_train")
    compare(outputs.loss[None], "out/train/loss", "model_train")

    outputs.loss.backward()
    description, expected = catseg_case("model_train")
    for prefix in ("grad/frozen/", "grad/"):
        for key, value in parameters(expected, prefix).items():
            if prefix == "grad/" and key.startswith("frozen/"):
                continue
            for name, gradient in rename({key: value}, CATSEG_KEY_TABLE).items():
                actual = model.get_parameter(name).grad  # none where ours leaves out what theirs multiplies and drops
                actual = torch.zeros_like(gradient) if actual is None else actual
                atol = description["tensors"][f"{prefix}{key}"]["atol"]
                torch.testing.assert_close(actual.view_as(gradient), gradient, rtol=0, atol=atol, msg=name)


def test_other_words_than_those_of_the_training():
    model = catseg_model(inference_mode="whole").eval()
    description, tensors = catseg_case("model")
    model.prompts.set_token_ids(token_ids("eval"))
    embeds = model.encode_classes().detach()
    model.prompts.set_token_ids(token_ids("train"))
    steps, images = kept_steps(model), batch("eval")
    outputs = model(images, text_embeds=embeds)
    compare_steps(model, steps, outputs, "eval", "model")
    probabilities = resize_bilinear(outputs.logits.sigmoid()[:1], description["eval_output_size"])
    compare(probabilities[0], "out/eval/sem_seg", "model")
    # Each image has its own result, whatever lies beside it.
    torch.testing.assert_close(model(images[1:], text_embeds=embeds).logits, outputs.logits[1:], rtol=0, atol=1e-5)


def test_positions_for_another_grid():
    model = catseg_model()
    grid = model.config.tower_image_size // model.config.embedding_stride
    positions = model.clip.vision_model.embeddings.position_embedding.weight
    compare(resize_position_grid(positions, (grid, grid), "bicubic"), "out/positions", "model")


@pytest.mark.parametrize("case", INFERENCE)
@torch.no_grad()
def test_sliding_windows_beside_the_whole_image(case):
    options = INFERENCE[case]
    model = catseg_model(
        inference_mode="slide_and_whole",
        crop_size=options["kernel"],
        stride=options["stride"],
        slide_size=options["out_res"],
        aggregator={"max_classes": options["pad_len"], "inference_pooling_size": options["pooling"]},
    ).eval()
    model.prompts.set_token_ids(token_ids("eval"))
    _, tensors = catseg_case("inference")
    steps = kept_steps(model)
    merged = model(normalized(tensors[f"in/{case}/image"])[None]).logits
    compare(torch.cat(steps["clip_image"]), f"step/{case}/clip_image", "inference")
    logits = torch.cat(steps["logits"])
    compare(logits, f"step/{case}/logits", "inference")
    if f"step/{case}/kept" in tensors:
        assert torch.equal((logits != LEFT_OUT).all(dim=(2, 3)), tensors[f"step/{case}/kept"].bool())
    compare(merged[0], f"step/{case}/merged", "inference")
    whole = resize_bilinear(resize_bilinear(logits[-1:], [options["kernel"]] * 2).sigmoid(), options["out_res"])
    windows = (2 * merged - whole)[0] * tensors[f"step/{case}/fold_count"]
    compare(windows, f"step/{case}/fold_sum", "inference")
    compare(resize_bilinear(merged, options["height_width"])[0], f"out/{case}/sem_seg", "inference")
