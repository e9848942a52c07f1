"""``skipcache report``: results of benchmarks as one HTML page, as plots and as Markdown."""
