"""Facts about model families: architecture, and names of weights in Megatron and Hugging Face.

Importing this package needs neither torch nor Megatron: the driver's checks and the plan read it.
`weights/` moves the tensors.
"""
