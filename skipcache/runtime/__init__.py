"""The hot path: how a cached forward runs. Imports torch and leaf modules only."""
