"""Sharing a model directory: its card with results, what of it goes to the Hub, and exported programs.

A saved directory comes in; `README.md`, a folder to push, or ONNX and `torch.export` files come out.
"""

from .card import CARD, add_results, shown_name, write_card
from .export import check_export, export, export_frozen, quantize
from .hub import add_code, folder_to_push, push


__all__ = [
    "CARD",
    "add_code",
    "add_results",
    "check_export",
    "export",
    "export_frozen",
    "folder_to_push",
    "push",
    "quantize",
    "shown_name",
    "write_card",
]
