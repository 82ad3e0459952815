"""The built-in scenes and the tiny CLIP trained on them."""
