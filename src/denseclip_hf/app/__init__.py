"""
A page to try models on one's own images, and its API.

Uploads and words come in; what [`answers`] makes of them is shown, downloaded, or sent to a program. Gradio is
imported by [`page`] alone.
"""

from .answers import AppModels


__all__ = ["AppModels"]
