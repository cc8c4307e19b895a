"""Stores without the disk's own time."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Tests survive no power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
