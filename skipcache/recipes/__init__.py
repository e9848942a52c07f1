"""Recipes: name a speedup, and get the schedule and the weights that lose least."""
