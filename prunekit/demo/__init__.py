"""The embedded model, trained on the Python standard library, with its script and its card."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "model"
