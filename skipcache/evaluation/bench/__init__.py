"""``skipcache bench``: speed and quality of caching methods, ours and others', in one run."""
