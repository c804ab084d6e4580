"""The commands of `python -m convext`, a module each."""
