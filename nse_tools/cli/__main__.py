"""``python -m nse_tools.cli``."""

from nse_tools.cli import app

app()
