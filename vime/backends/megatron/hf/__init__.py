"""Facts about model families: their architecture, and the names of their weights on either side.

Importing this package needs neither torch nor Megatron: the driver's checks and the plan read it.
`weights/` moves the tensors.
"""
