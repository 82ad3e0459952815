"""The built-in example, from drawn data to an image of what a model sees.

    denseclip demo --output_dir outputs/demo

Draws small scenes, makes a tiny CLIP, trains a segmenter on them, evaluates it on held-out scenes, loads the saved
model in a fresh process through the Auto classes and the pipeline, and draws what it sees.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .arguments import HelpFormatter, one_sentence_errors, recipe_file


# What anybody does with the saved directory; run in a process that knows nothing of this one.
FRESH_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from transformers import pipeline
import denseclip_hf
from denseclip_hf.inference import colorize, comparison_image, overlay

model_dir, data_dir, drawn = sys.argv[1:]
segment = pipeline("image-segmentation", model=model_dir)
config = segment.model.config
label2id, palette = config.label2id, config.palette
rows = []
for file in sorted(Path(data_dir, "val", "images").glob("*.jpg"))[:4]:
    image = Image.open(file).convert("RGB")
    prediction = np.full(image.size[::-1], 255)
    for found in segment(image):
        prediction[np.asarray(found["mask"]) > 0] = label2id[found["label"]]
    truth = np.asarray(Image.open(Path(data_dir, "val", "masks", f"{file.stem}.png")))
    maps = [colorize(ids, palette) for ids in (prediction, truth)]
    rows.append([image, overlay(image, prediction, palette), *maps])
titles = ["input", "prediction over input", "prediction", "ground truth (black: void)"]
comparison_image(rows, titles, config.id2label, palette).save(drawn)
"""


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="of data, model and image")
    parser.add_argument("--max_steps", type=int, default=None, help="train shorter or longer than the recipe")
    args = parser.parse_args(argv)
    from ..example import make_example_clip, make_example_dataset

    start = time.perf_counter()
    data, clip = args.output_dir / "data", args.output_dir / "clip"
    model, drawn = args.output_dir / "model", args.output_dir / "demo.png"
    say("1/4  Drawing example scenes and making a tiny CLIP")
    make_example_dataset(data)
    make_example_clip(clip, vision="resnet")
    say("2/4  Training a segmenter on them, and evaluating it on held-out scenes")
    if (model / "recipe.json").exists():  # an earlier demo's, which this one replaces
        shutil.rmtree(model)
    flags = ["--clip", clip, "--dataset", data, "--output_dir", model]
    if args.max_steps:
        flags += ["--max_steps", args.max_steps, "--warmup_steps", args.max_steps // 20]
    run(["-m", "denseclip_hf.cli.train", recipe_file("example.yaml"), *flags])
    say("3/4  Loading the saved model in a fresh process, through the pipeline, and drawing what it sees")
    run(["-c", FRESH_PROCESS, model, data, drawn])
    results = json.loads((model / "eval_results.json").read_text())
    classes = json.loads((data / "classes.json").read_text())["id2label"]
    say(f"4/4  Done in {time.perf_counter() - start:.0f} s. On scenes it has not seen:")
    for name, iou in zip(classes.values(), results["eval_per_category_iou"], strict=True):
        print(f"  {name:<16} IoU " + ("not seen" if iou is None else f"{100 * iou:5.1f} %"))
    print(f"  {'mean':<16} IoU {100 * results['eval_mean_iou']:5.1f} %")
    print(f"\n  image  {drawn.resolve()}\n  model  {model.resolve()}\n  data   {data.resolve()}")


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def run(command: list) -> None:
    if code := subprocess.run([sys.executable, *map(str, command)]).returncode:
        sys.exit(code)  # it has said why


if __name__ == "__main__":
    main()
