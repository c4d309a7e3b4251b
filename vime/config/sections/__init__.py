"""The sections of a configuration, one frozen dataclass each. Every field declares its flag.

A section checks its own values; rules across sections are in `vime/config/rules/`.
"""
