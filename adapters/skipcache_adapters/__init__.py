"""The adapters that come with skipcache. Found through entry points, exactly like anybody else's."""
