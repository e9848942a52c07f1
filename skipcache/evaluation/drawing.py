"""What all that draws needs."""

from __future__ import annotations

from skipcache.errors import SkipCacheError


def require_matplotlib() -> None:
    """Checks, before a long measurement, that its result can be drawn.

    Raises:
        SkipCacheError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise SkipCacheError(
            "pictures need matplotlib, which is not installed. Install it (pip install "
            "matplotlib, or skipcache with its extra 'bench')."
        ) from None
