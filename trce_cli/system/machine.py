"""What a result was made with: this program and the libraries under it."""

from typing import Final

__version__: Final = "0.1.0"
