"""The embedded model: a small Llama trained on the Python standard library, its training script and
card.
"""
