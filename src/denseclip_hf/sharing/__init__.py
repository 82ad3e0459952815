"""Model card, Hub and export."""
