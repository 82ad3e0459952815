"""The model: what a Hub repository carries beside the weights."""
