"""The adapters that come with skipcache. Found by entry points, like anybody else's."""
