"""What the commands do besides training; `cli.py` is their face."""
