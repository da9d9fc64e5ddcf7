"""``python -m nse_tools``."""

from nse_tools.cli import app

app()
