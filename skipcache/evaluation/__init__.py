"""Measures speed, memory and quality. Speedup means wall-clock against the same work uncached, in
the same run.
"""
