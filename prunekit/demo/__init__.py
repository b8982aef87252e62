"""The embedded model: a small Llama trained on the Python standard library, its script, its card."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "model"
