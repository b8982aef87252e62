"""A model run on calibration data, layer by layer or whole: what its matrices are fed, and what
gradients they get.
"""
