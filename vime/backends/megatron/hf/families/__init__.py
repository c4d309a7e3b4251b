"""One file a family, each with a `FAMILY`. The registry finds every file of this folder."""
