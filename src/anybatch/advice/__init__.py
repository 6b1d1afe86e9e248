"""Which recipe, and which batch size: by measurement."""
