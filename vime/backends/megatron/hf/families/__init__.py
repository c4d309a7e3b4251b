"""One file per family, each with a `FAMILY`. The registry finds every file in this folder."""
