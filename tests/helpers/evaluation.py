"""A model and data to measure it on."""

from collections.abc import Callable
from pathlib import Path

from denseclip_hf.evaluation import EvaluationArguments
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from helpers.models import tiny_model, varied
from helpers.training import write_folder


def street_arguments(folder: Path) -> Callable[..., EvaluationArguments]:
    """Makes the arguments for a model of sky, road and car, and twelve such images without a validation split."""
    model = varied(tiny_model())
    model.config.id2label = {0: "sky", 1: "road", 2: "car"}
    for part in (model, DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})):
        part.save_pretrained(folder / "model")
    data = write_folder(folder / "data", 12)

    def make(**options):
        names = {name: str(folder / name) for name in ("model", "output_dir")}
        return EvaluationArguments(dataset=str(data), **names, **options)

    return make
