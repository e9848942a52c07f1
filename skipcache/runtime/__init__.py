"""The hot path: how a cached forward runs. Imports torch and the leaf modules, no adapter and no diffusers."""
