"""The model: wrapping, loading, architectures, original weights."""

from nse_tools.models.architecture import ARCHITECTURES, Architecture
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.loading import load_model

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "EditableModel",
    "load_model",
]
