"""What a model is made of, known by no architecture's name: sizes, the decoder stack, ties,
configs, workarounds.
"""
