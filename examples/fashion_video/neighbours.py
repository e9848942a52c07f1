"""Puts neighbouring recipes on the path: ``data`` and ``train_dit`` of ``../fashion_dit``, and,
``render``, ``text_modules`` and ``training`` of ``../fashion_text``.
"""

import sys
from pathlib import Path

_EXAMPLES = Path(__file__).resolve().parents[1]
for _name in ("fashion_text", "fashion_dit"):
    if str(_EXAMPLES / _name) not in sys.path:
        sys.path.append(str(_EXAMPLES / _name))
