"""A model run on calibration data, layer by layer or whole.

The way of a calibration token from its batch to a Hessian:

1. `walk`: batches are numbered by their samples and shared among the processes.
2. `calls`: each batch goes through the model up to its first layer; the hidden states go to the
   `store`, the other arguments of the layers are noted.
3. `stream`: layer after layer, group after group, a `layer_pass` runs the layer on the hidden
   states as far as the group's `consumers`.
4. `consumers`: hooks show the inputs x [n] of each consumer; `feeding` passes them on.
5. `observe`: held-out samples are set apart, consumers that are fed the same
   inputs share a site.
6. `moments`: H ← H + (x xᵀ − H) / tokens.
7. `statistics`: H becomes A = (H + λI)⁻¹, by which the caller of the walk chooses units and repairs
   consumers.
8. `layer_pass`: the hidden states behind the repaired layer take the place of those before it.

Beside that, `activations` gathers statistics of single inputs in one pass of the whole model, and
`gradients` those of a loss.
"""
