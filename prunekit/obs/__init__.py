"""Optimal Brain Surgeon as pure functions of tensors (SlimGPT, sections 3 and 4).

No module here runs a model, places a tensor on a device, or prints. `inverse` holds the equations;
`choose` decides which units go, `downdate` makes that cheap for single columns with `matrices` that
suit the device, `replay` gives a GPU many steps at once, and `swap` improves the choice.
"""
