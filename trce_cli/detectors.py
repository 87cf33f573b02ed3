"""What a package that brings a detector imports; see docs/results.md."""

from trce_cli.evaluate.detectors.base import Detector, Request

__all__ = ["Detector", "Request"]
