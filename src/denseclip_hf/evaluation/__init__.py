"""The evaluation loop, reports and what `evaluate` measures."""
