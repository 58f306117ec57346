"""Lets ``import coterie.moe`` and ``python -m coterie.launch`` work from the checkout's root.

The top-level folders are the sub-packages of the namespace package ``coterie``. Installed, setup.py
maps them; here this file stands in for the package. It is never installed.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parent)]
