"""A package, so that its engine ends with it: see `engine` in `conftest.py`."""
