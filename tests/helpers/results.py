"""A report of an evaluation."""

import math


RESULTS = {
    "model": "tiny",
    "dataset": "example",
    "split": "val",
    "protocol": {"inference_mode": "slide", "crop_size": [64, 64], "scales": [1.0], "flip": False},
    "num_images": 7,
    "metrics": {"mean_iou": 0.43512, "mean_accuracy": math.nan, "overall_accuracy": 0.8, "mean_dice": 0.5},
    "per_category": {"class 0": {"iou": 0.5, "accuracy": 0.6}, "class 1": {"iou": math.nan}, "class 2": {"iou": 0.25}},
}
