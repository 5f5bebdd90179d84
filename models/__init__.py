"""Swin models and their factory."""

from .build import build_model

__all__ = ["build_model"]
